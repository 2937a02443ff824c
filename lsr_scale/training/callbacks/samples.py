"""Answers to `eval.prompts` while a run trains: before, at each evaluation and after, in `samples.jsonl` and shown."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lsr_scale import distributed
from lsr_scale.data.prompts import EncodedPrompt, Prompt
from lsr_scale.errors import shortened
from lsr_scale.model.gather import reshard
from lsr_scale.model.shard import is_sharded
from lsr_scale.model.tokenizer import end_tokens
from lsr_scale.screen import Screen

Moment = Literal["before", "evaluation", "after"]
_BATCH = 8  # prompts at once; their keys and values take memory that a step has spoken for
_SHOWN_PROMPT, _SHOWN_COMPLETION = 160, 600  # characters; samples.jsonl has all


@dataclass(frozen=True)
class Sample:
    """A greedy completion, as a line of `samples.jsonl` has it; `prompt` is as the user wrote it."""

    step: int
    moment: Moment
    prompt: Prompt
    completion: str


class Samples(TrainerCallback):
    """Has the model in training complete the run's prompts.

    Every process generates, since a base that is sharded takes all of them; the main one writes and shows. Greedy
    decoding draws no random numbers and every module's mode is restored, so training is the same bit for bit. Goes
    before `Progress`, which leaves what an evaluation took out of the speed.
    """

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        max_new_tokens: int,
        file: Path,
        say: Callable[[str], None],
        record: Callable[[list[Sample]], None] = lambda samples: None,
    ) -> None:
        """Take what is generated, and where it goes.

        Args:
            prompts: The run's.
            max_new_tokens: When a completion ends at the latest.
            file: `samples.jsonl`, which is appended to.
            say: Shows text on the screen.
            record: Called with the samples of each moment, on the main process.
        """
        self.prompts, self.max_new_tokens, self.file = prompts, max_new_tokens, file
        self.say, self.record = say, record
        self._last: list[Sample] = []

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take samples at an evaluation; one before the first step (`eval_on_start`) has those from before training."""
        if state.global_step:
            self.take(kwargs["model"], kwargs["processing_class"], state.global_step, "evaluation")

    def take(self, model: Any, tokenizer: Any, step: int, moment: Moment) -> None:
        """Take samples; every process must call it."""
        if not self.prompts:
            return
        completions = complete(model, tokenizer, [one.ids for one in self.prompts], self.max_new_tokens)
        if not distributed.is_main():
            return
        pairs = zip(self.prompts, completions, strict=True)
        samples = [Sample(step, moment, one.prompt, completion) for one, completion in pairs]
        with self.file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(vars(sample), ensure_ascii=False) + "\n" for sample in samples)
        same = [one.completion for one in samples] == [one.completion for one in self._last]
        self.say(f"samples {_when(samples[0])}: the same" if same else shown(samples))
        self.record(samples)
        self._last = samples


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Return the greedy completions of tokenized prompts by a model that may be in training; its modes are restored.

    Args:
        model: A causal language model with its adapter; where it is sharded, every process must call this.
        tokenizer: Its tokenizer.
        prompts: Token ids, at least one each.
        max_new_tokens: When a completion ends at the latest.
    """
    ends = end_tokens(tokenizer, model.generation_config.eos_token_id)
    texts: list[str] = []
    with _evaluating(model):
        for start in range(0, len(prompts), _BATCH):
            batch = prompts[start : start + _BATCH]
            longest = max(map(len, batch))
            # from the left, so that all continue at one place
            padding = [longest - len(ids) for ids in batch]
            rows = [[tokenizer.pad_token_id] * num + ids for num, ids in zip(padding, batch, strict=True)]
            masks = [[0] * num + [1] * (longest - num) for num in padding]
            generated = model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(masks, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends or None,
                synced_gpus=is_sharded(model) and distributed.world_size() > 1,
            )
            texts += tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
    reshard(model)
    return texts


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and afterwards every module into the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def shown(samples: Sequence[Sample]) -> str:
    """Return samples of one moment as lines for the screen: prompts after ">", completions below them."""
    screen = Screen()

    def lines(text: str, first: str, limit: int) -> list[str]:
        wrapped = Text(shortened(text.strip("\n"), limit)).wrap(screen, screen.width - 4)
        return [(first if number == 0 else "    ") + line.plain.rstrip() for number, line in enumerate(wrapped)]

    parts = [f"samples {_when(samples[0])}:"]
    for sample in samples:
        prompt = sample.prompt if isinstance(sample.prompt, str) else sample.prompt[-1]["content"]
        parts += lines(prompt, "  > ", _SHOWN_PROMPT)
        parts += lines(sample.completion or "(it ends at once)", "    ", _SHOWN_COMPLETION)
    return "\n".join(parts)


def _when(sample: Sample) -> str:
    return {"before": "before training", "after": "after training"}.get(sample.moment, f"at step {sample.step}")
