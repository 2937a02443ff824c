"""The names that `training.report_to` takes, as transformers has them, and what has to be installed for each."""

# name: the module that is imported, and what pip installs for it
REPORTERS: dict[str, tuple[str, str]] = {
    "tensorboard": ("tensorboard", "lsr_scale[tensorboard]"),
    "wandb": ("wandb", "lsr_scale[wandb]"),
    "azure_ml": ("azureml.core", "azureml-core"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet_ml"),
    "dagshub": ("dagshub", "dagshub mlflow"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "kubeflow": ("kubeflow", "kubeflow"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "trackio": ("trackio", "trackio"),
}


def reporter_names(report_to: str | list[str] | None) -> list[str]:
    """Return the names that a setting lists; "all" and "none" stand for what they say."""
    listed = [report_to] if isinstance(report_to, str) else report_to or []
    return [] if listed == ["none"] else list(dict.fromkeys(listed))
