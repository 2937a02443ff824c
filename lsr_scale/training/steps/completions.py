"""GRPO's completions by `Decoder`, and what a run keeps of them; goes before TRL's trainer among a class's bases.

Completions of one prompt share its forward pass, the adapter stays a pair beside the quantized base, and on a GPU each
decoding step is a replayed CUDA graph. Where the decoder cannot do what the run asks for, TRL's own generation does.
What is learned from them is by the log-probabilities of training's own forward, so importance ratios begin at 1.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from lsr_scale import distributed
from lsr_scale.data.order import PromptOrder
from lsr_scale.generation.decoder import Decoder, NotFiniteError
from lsr_scale.generation.fallback import decoder_fallback_reason
from lsr_scale.model.gather import gathered
from lsr_scale.rewards.checked import ROW, text_of
from lsr_scale.training.steps.nonfinite import diverged

_Base: Any = Trainer
# completions of one prompt that a logging step keeps
KEPT = 4


class DecodedCompletions(_Base):
    """Completions for GRPO's trainer, and a file of some of them.

    Attributes:
        say: Told in a line how completions are generated.
        completions_file: Where some completions of each logging step go; None keeps none.
        longest_row: Tokens of the longest prompt and the longest completion.
    """

    say: Callable[[str], None] = staticmethod(lambda text: None)
    completions_file: Path | None = None
    longest_row: int | None = None
    _decoder: Decoder | None = None
    _generation_said: str | None = None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, with the same draws each time; `Resumable` sees that they are none of training's."""
        torch.manual_seed(self.args.seed + distributed.rank())
        return super().evaluation_loop(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Do a micro-batch; one that resumes is in TRL's cycle of generating and reusing where the run was."""
        micro = self.state.global_step * self.args.gradient_accumulation_steps
        if self._buffered_inputs is None:
            self._step = max(self._step, micro)
            if self._step % (self.args.steps_per_generation * self.num_iterations):
                self.say(
                    f"note: step {self.state.global_step + 1} was to learn from completions that a step before it had "
                    "generated; a checkpoint has none, so they are generated anew"
                )
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """Return TRL's order of the prompts, for a run that resumes too."""
        return PromptOrder(super()._get_train_sampler(dataset))

    def generation_fallback_reason(self, longest_prompt: int) -> str | None:
        """Return why TRL generates the completions, or None."""
        args = self.args
        if args.use_vllm:
            return "training.use_vllm: vLLM generates"
        if args.use_transformers_continuous_batching:
            return "training.use_transformers_continuous_batching is set"
        if args.generation_kwargs:
            return f"training.generation_kwargs sets {', '.join(args.generation_kwargs)}"
        if args.cache_implementation:
            return "training.cache_implementation is set"
        if self.is_fsdp_enabled:
            return "FSDP shards the weights"
        return decoder_fallback_reason(self.model, longest_prompt + self.max_completion_length)

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the completions of prompts, and None for log-probabilities that training computes itself."""
        began = time.monotonic()
        reason = self.generation_fallback_reason(max(map(len, prompt_ids)))
        if reason is None and images is not None:
            reason = "prompts have images"
        how = f"by TRL: {reason}" if reason else "by the decoder, with a cache of fixed size"
        if how != self._generation_said:
            self.say(f"completions are generated {how}")
            self._generation_said = how
        if self.use_vllm:
            self.vllm_generation.say = self.say
        # processes generate different numbers of tokens, so a sharded base is not gathered layer by layer
        with nullcontext() if self.use_vllm else gathered(self.model):
            if reason:
                result = super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
            else:
                result = self._decoded(prompt_ids), None
        sent = self.vllm_generation.sent if self.use_vllm else []
        if self.model.training:
            self._metrics["train"]["generation_s"].append(time.monotonic() - began)
            for size, seconds in sent:
                self._metrics["train"]["vllm/sent_bytes"].append(size)
                self._metrics["train"]["vllm/sent_s"].append(seconds)
        sent.clear()
        return result

    def _decoded(self, prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the completions of prompts, ends included; those that stand beside each other and are alike share.

        The decoder's memory is free afterwards: training's passes need theirs, and a graph is captured in two steps.

        Raises:
            UserError: if training has diverged, so that logits are not finite.
        """
        if self._decoder is None:
            self._decoder = Decoder(self.model)
        alike = [(ids, len(list(group))) for ids, group in groupby(list(ids) for ids in prompt_ids)]
        longest, device = max(len(ids) for ids, _ in alike), self.accelerator.device
        pad = self._tokenizer.pad_token_id
        rows = torch.tensor([[pad] * (longest - len(ids)) + ids for ids, _ in alike], device=device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in alike], device=device)
        try:
            generated = self._decoder.generate(
                rows,
                mask,
                answers=[number for _, number in alike],
                max_new_tokens=self.max_completion_length,
                temperature=self.temperature,
                top_p=self.top_p if self.top_p < 1 else None,
                top_k=self.top_k or None,
                min_p=self.min_p or None,
                repetition_penalty=self.repetition_penalty,
                eos_token_id=self.eos_token_ids,
                pad_token_id=pad,
            )
        except NotFiniteError:
            step = self.state.global_step
            raise diverged(f"the logits of completions are not finite after step {step}") from None
        finally:
            self._decoder.clear()
        ends = set(self.eos_token_ids)
        return [_until(ids, ends) for ids in generated[:, longest:].tolist()]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch of completions, with where the row of each stands, for messages."""
        batch = super()._generate_and_score_completions(inputs)
        return {**batch, ROW: [one.get(ROW) for one in inputs]}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, keep some of the last completions with their rewards, and say at the end where these never differed."""
        if self.model.training and "loss" in logs and self.completions_file is not None:
            self._keep_completions()
        if "train_runtime" in logs and not self._rewards_differed():
            self.say(
                "note: in no step were two completions of a prompt worth different rewards, so nothing was learned: "
                "completions.jsonl has some of them; change training.reward, or what prompts ask for"
            )
        super().log(logs, start_time)

    def _rewards_differed(self) -> bool:
        """Tell whether completions of one prompt were worth different rewards in any step, before a resume too."""
        name = "frac_reward_zero_std"
        shares = [row[name] for row in self.state.log_history if name in row]
        return any(share < 1 for share in [*shares, *self._metrics["train"][name]])

    def _keep_completions(self) -> None:
        if not self.is_world_process_zero() or not self._logs["prompt"]:
            return
        recorded, file = self._logs, self.completions_file
        assert file is not None
        prompt = recorded["prompt"][-1]
        of_prompt = [index for index, other in enumerate(recorded["prompt"]) if other == prompt][:KEPT]
        with file.open("a", encoding="utf-8") as stream:
            for index in of_prompt:
                line = {
                    "step": self.state.global_step,
                    "prompt": prompt,
                    "completion": text_of(recorded["completion"][index]),
                    "rewards": {name: values[index] for name, values in recorded["rewards"].items()},
                    "advantage": round(recorded["advantages"][index], 4),
                }
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """Return tokens up to the first that ends a row, which is included."""
    end = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return ids[: end + 1]
