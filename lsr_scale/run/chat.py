"""A conversation with a model: turns are read, answers stream, and both are kept for what follows."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lsr_scale.errors import UserError
from lsr_scale.generation.sampling import Sampling
from lsr_scale.run.generate import Answer, Streamer
from lsr_scale.run.generator import Generator

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


@dataclass
class Chat:
    """A conversation, turn by turn.

    Attributes:
        generator: What answers.
        sampling: How.
        system: The system prompt, if there is one.
        show: Given the answer's text as it comes.
        messages: The conversation so far, as the chat template takes it.
        answers: What the model said, those from before a reset too.
    """

    generator: Generator
    sampling: Sampling
    system: str | None = None
    show: Callable[[str], None] = lambda text: None
    messages: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with the system prompt."""
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, but for the system prompt."""
        self.messages = self.generator.conversation(self.system)

    def say(self, text: str) -> str:
        """Return the answer to a turn; Ctrl-C stops it, and what was said until then is the answer.

        Raises:
            UserError: if the model cannot take the turn, which is forgotten then.
        """
        conversation = [*self.messages, {"role": "user", "content": text}]
        streamer = Streamer(self.generator.tokenizer, self.show)
        try:
            answer = self.generator.answer(conversation, self.sampling, streamer=streamer, where="this conversation")
            self.answers.append(answer)
            said = answer.text
        except KeyboardInterrupt:
            streamer.end()
            said = streamer.text()
        self.messages = [*conversation, {"role": "assistant", "content": said}]
        return said


def converse(
    chat: Chat,
    read: Callable[[], str],
    note: Callable[[str], None],
    answered: Callable[[str, str], None] = lambda turn, answer: None,
    interactive: bool = True,
) -> None:
    """Answer turns until there are no more.

    Args:
        chat: The conversation.
        read: Returns the next turn; raises EOFError after the last one.
        note: Told, in a line each, what is no answer.
        answered: Called with each turn and its answer.
        interactive: A person is there: Ctrl-C between answers and a mistake leave the conversation standing.

    Raises:
        UserError: for a turn that the model cannot take, where nobody is there to say it differently.
    """
    while True:
        try:
            turn = read()
            command = turn.strip()
            if command in ("/exit", "/quit"):
                return
            if command == "/reset":
                chat.reset()
                note("the conversation is forgotten")
            elif re.fullmatch(r"/[a-z]+", command):
                note(f"no command {command}; {HELP}")
            elif command:
                answered(turn, chat.say(turn))
        except EOFError:
            return
        except KeyboardInterrupt:  # not in an answer, which ends by it, but before it or after
            if not interactive:
                raise
            note(HELP)
        except UserError as error:
            if not interactive:
                raise
            note(f"{error}; /reset forgets the conversation")
