"""What completions were worth in a run (`rewards.json`): said when it begins, compared where it resumes."""

import json
from pathlib import Path
from typing import Any

from lsr_scale.config import RunConfig
from lsr_scale.config.rewards import rewards_of
from lsr_scale.rewards.user_file import read_file, sha256, split_reference


def reward_record(run: RunConfig) -> dict[str, Any]:
    """Return what `rewards.json` holds: each reward with its options, and a user's own with its file's hash and text.

    Raises:
        UserError: if a file cannot be read.
    """
    record = []
    for reward in rewards_of(run.training):
        one: dict[str, Any] = reward.model_dump(exclude_none=True)
        if reference := split_reference(reward.name):
            text = read_file(reference[0])
            one |= {"sha256": sha256(text), "source": text.decode("utf-8", "replace")}
        record.append(one)
    return {"rewards": record}


def describe_rewards(run: RunConfig) -> list[str]:
    """Return in lines what completions are worth, with the files whose code runs for it.

    Raises:
        UserError: if a file cannot be read.
    """
    lines = []
    for reward in reward_record(run)["rewards"]:
        options = "".join(f", {name} {reward[name]}" for name in ("pattern", "tokens") if name in reward)
        code = f"; the code of this file runs (sha256 {reward['sha256'][:12]})" if "sha256" in reward else ""
        lines.append(f"reward: {reward['name']}, weight {reward['weight']:g}{options}{code}")
    return lines


def reward_changes(file: Path, run: RunConfig) -> list[str]:
    """Return in lines which of a user's functions are no longer those that a run began with.

    Args:
        file: `rewards.json` of the folder that is resumed from.
        run: The run as it is now.
    """
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))["rewards"] if file.is_file() else []
        before = {one["name"]: one.get("sha256") for one in earlier}
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{file}: cannot be read, so nobody knows whether the rewards are those that the run began with"]
    return [
        f"the file of the reward {one['name']} has changed since the run began (what it was is in {file})"
        for one in reward_record(run)["rewards"]
        if before.get(one["name"], one.get("sha256")) != one.get("sha256")
    ]
