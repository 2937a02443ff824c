"""What answers prompts: a run's adapter on its base, or a base alone; its tokenizer at once, its model when needed."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import psutil
from transformers.generation.streamers import TextStreamer

from lsr_scale.config.sections import ModelSection
from lsr_scale.data.prompts import Prompt, prompt_of_row
from lsr_scale.data.readers import has_lines, read_file
from lsr_scale.errors import UserError
from lsr_scale.generation.decoder import Decoder
from lsr_scale.generation.sampling import Sampling
from lsr_scale.layers.frozen_linear import dequantize_all, dequantized_bytes
from lsr_scale.model import load_base_for, load_config, load_tokenizer, meta_model, own_quantization, tokenizer_of
from lsr_scale.model.load_errors import suggest_base_option
from lsr_scale.model.tokenizer import render_chat, without_appended
from lsr_scale.paths import user_path
from lsr_scale.run.generate import (
    LONGEST_ROW,
    Answer,
    check_fits,
    check_has_template,
    complete,
    context_length,
    encode,
)
from lsr_scale.run.load import load_run_model, open_trained, trained_on_chat

logger = logging.getLogger(__name__)
Say = Callable[[str], None]


class Generator:
    """A model that answers prompts.

    Attributes:
        tokenizer: Its tokenizer.
        model_config: Its configuration, as transformers has it.
        context: How many tokens it takes; None where nothing says so.
        trained_on_chat: Whether its run trained on conversations; None where that is not known.
    """

    def __init__(
        self,
        tokenizer: Any,
        model_config: Any,
        context: int | None,
        load: Callable[[], Any],
        trained_on_chat: bool | None = None,
        say: Say = logger.warning,
    ) -> None:
        """Take what `load` will load the model of."""
        self.tokenizer, self.model_config, self.context = tokenizer, model_config, context
        self.trained_on_chat, self._load, self._say = trained_on_chat, load, say
        self._say_once = cache(say)
        self._decoders: dict[bool, Decoder] = {}  # of the base, of the adapter: each keeps its CUDA graph

    @classmethod
    def of_run(
        cls, path: str | Path, base_only: bool = False, base: str | None = None, say: Say = logger.warning
    ) -> "Generator":
        """Return that of a finished run.

        Args:
            path: The run's folder, or a checkpoint's in it.
            base_only: Leave the adapter out.
            base: The base model's name, where it lies elsewhere than when the run began.
            say: Told what a user should know, a line each.

        Raises:
            UserError: if there is no run, no adapter in it, its base is not to be found, or it is a classifier.
        """
        folder, run = open_trained(path, base_only)

        def load() -> Any:
            model, _, _ = load_run_model(path, base_only, base=base)
            return _fast_on_cpu(model)

        with suggest_base_option(base):
            section = run.model if base is None else _elsewhere(run.model, base)
            tokenizer = tokenizer_of(run.model_copy(update={"model": section}), folder.tokenizer, say)
            config = load_config(section.name, section.revision)
        context = context_length(config, partial(meta_model, config), run.training.get("max_length"))
        return cls(tokenizer, config, context, load, trained_on_chat(folder, run), say)

    @classmethod
    def of_base(cls, name: str, quantization: str | None = None, say: Say = logger.warning) -> "Generator":
        """Return that of a base model.

        Args:
            name: Hub name, local folder, or `builtin:` name.
            quantization: "nf4", "fp4", "int8" or "none"; None: as its weights are already, or nf4.
            say: Told what a user should know, a line each.

        Raises:
            UserError: for an unknown model.
        """
        config = load_config(name)
        held = quantization or own_quantization(config, name) or "nf4"
        section = ModelSection.model_validate({"name": name, "quantization": held})
        context = context_length(config, partial(meta_model, config))
        tokenizer = without_appended(load_tokenizer(name), say)
        return cls(tokenizer, config, context, lambda: _fast_on_cpu(load_base_for(section, 0).eval()), say=say)

    @classmethod
    def of_model(cls, model: Any, tokenizer: Any, say: Say = logger.warning) -> "Generator":
        """Return that of a model in memory, which stays as it is."""
        return cls(tokenizer, model.config, context_length(model.config, lambda: model), lambda: model, say=say)

    @cached_property
    def model(self) -> Any:
        """The model, loaded now if it was not before."""
        return self._load()

    def uses_template(self, chat: bool | None, system: str | None) -> tuple[bool, str]:
        """Return whether prompts that are text go into the chat template, and why, in words.

        Args:
            chat: Yes or no; None where it is as the run trained.
            system: A system prompt, which needs the template.

        Raises:
            UserError: if there is no template where one is needed.
        """
        if chat is False and system is not None:
            raise UserError("--system: goes into the chat template, which --raw leaves out; give one of them")
        if chat is None and system is None:
            if not self.trained_on_chat:
                trained = "" if self.trained_on_chat is None else ", as the run trained on text"
                remedy = "; --chat puts it into the chat template" if self.tokenizer.chat_template else ""
                return False, f"the prompt is continued as it stands{trained}{remedy}"
            check_has_template(self.tokenizer)
            return True, "the prompt goes into the chat template, as the run trained on chat; --raw leaves it out"
        if chat is not False:
            check_has_template(self.tokenizer)
        return chat is not False, ""

    def conversation(self, system: str | None) -> list[dict[str, Any]]:
        """Return a conversation before its first turn: nothing, or the system prompt.

        Raises:
            UserError: if the chat template takes no system prompt.
        """
        if system is None:
            return []
        if not system.strip():
            raise UserError("--system: expected some text, got none; leave it out")
        check_has_template(self.tokenizer)
        start, turn = [{"role": "system", "content": system}], {"role": "user", "content": "Hello."}
        without = render_chat(self.tokenizer, [turn], add_generation_prompt=True)
        try:
            if render_chat(self.tokenizer, [*start, turn], add_generation_prompt=True) != without:
                return start
            why = "leaves it out"
        except UserError as error:
            why = f"refuses it ({str(error.__cause__)[:100]})"
        raise UserError(
            f"--system: the model has no place for a system prompt: its chat template {why}; write it at the beginning "
            "of the prompt instead"
        )

    def check(self, prompts: Sequence[tuple[str, Prompt]]) -> None:
        """Refuse prompts that the model cannot take; the model is not loaded for it.

        Args:
            prompts: Where each is from, for messages, and the prompt.

        Raises:
            UserError: as `encode` and `check_fits` do.
        """
        for where, prompt in prompts:
            check_fits(encode(self.tokenizer, prompt, where), self.tokenizer, self.model_config, self.context, where)

    def answer(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        streamer: TextStreamer | None = None,
        base: bool = False,
        where: str = "--prompt",
    ) -> Answer:
        """Return the model's answer, or with `base` that of its base without the adapter; see `complete`."""
        disabled = self.model.disable_adapter() if base else contextlib.nullcontext()
        if base not in self._decoders:
            self._decoders[base] = Decoder(self.model, longest=LONGEST_ROW, say=self._say_once)
        options: dict[str, Any] = {"context": self.context, "streamer": streamer, "say": self._say, "where": where}
        options["decoder"] = self._decoders[base]
        with disabled:
            return complete(self.model, self.tokenizer, prompt, sampling, **options)


def _elsewhere(section: ModelSection, base: str) -> ModelSection:
    return section.model_copy(update={"name": base, "revision": None})


def _fast_on_cpu(model: Any) -> Any:
    """Dequantize a model's weights once where it is on a CPU and they leave half of the free memory free."""
    size = dequantized_bytes(model)
    if size and model.device.type == "cpu" and 2 * size < psutil.virtual_memory().available:
        dequantize_all(model)
    return model


def read_prompts(path: str | Path) -> list[tuple[str, Prompt]]:
    """Return the prompts of a file, each with its place for messages.

    Args:
        path: JSONL or another of the formats of training rows, with `prompt` (text, or a conversation) or `messages`.

    Raises:
        UserError: naming the line, if it cannot be read, or has neither.
    """
    file = user_path(path, "--file")
    if not file.is_file():
        raise UserError(f"--file {path}: no such file")
    prompts: list[tuple[str, Prompt]] = []
    for number, row in read_file(file):
        where = f"{file}, {'line' if has_lines(file) else 'row'} {number}"
        prompt = prompt_of_row(row, where)
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]  # a training row's answer
        prompts.append((where, prompt))
    if not prompts:
        raise UserError(f"--file {path}: has no rows")
    return prompts
