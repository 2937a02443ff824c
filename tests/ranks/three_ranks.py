"""What training/test_sharding.py has three processes do, which no matrix is shared among equally.

    torchrun --nproc_per_node 3 tests/ranks/three_ranks.py FOLDER

The folder holds `model` of `tiny_runs`. By base: whether gathered matrices and logits are those of the whole base, and
the log-likelihoods of fewer batches of questions than there are processes, go to three-RANK.json.
"""

import json
import sys
from pathlib import Path

from lsr_scale import cli

BASES = ("none", "nf4", "int8")


def main() -> None:
    cli.quiet_libraries(debug=False)
    import torch

    from lsr_scale import distributed
    from lsr_scale.data.tasks import Example
    from lsr_scale.model import gather, load_base, load_tokenizer
    from lsr_scale.model.shard import Sharding
    from lsr_scale.scoring.scorer import score

    folder, seen = Path(sys.argv[-1]), {}
    name = str(folder / "model")
    distributed.start(use_deepspeed=False)
    tokenizer = load_tokenizer(name)
    questions = [Example(f"{n}", ("a knife", "a knife"), (" cuts", " digs"), 0, (4, 4)) for n in range(2)]
    for base in BASES:
        whole, sharded = (
            load_base(name, quantization=base, dtype="float32", sharding=one).eval() for one in (None, Sharding())
        )
        ids = torch.arange(12).reshape(2, 6)
        with torch.no_grad():
            same = torch.equal(whole(ids).logits, sharded(ids).logits)
        gather.reshard(sharded)
        scores = [
            [list(one.log_likelihoods) for one in score(model, tokenizer, questions, distribute=distribute).predictions]
            for model, distribute in ((whole, False), (sharded, True))
        ]
        gather.reshard(sharded)
        left = sum(p.numel() for p in sharded.parameters() if p.dim() > 1 and p.numel())
        with gather.gathered(sharded):
            equal = all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True))
        seen[base] = {"logits": same, "matrices": equal, "scores": scores, "left": left}
    (folder / f"three-{distributed.rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
