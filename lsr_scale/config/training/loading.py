"""The model and its tokenizer: the section `model` loads them, so no field of training does."""

from lsr_scale.config.training.subject import Subject

LOADING = Subject(
    owned={
        "model_init_kwargs": "the section model loads the model: set model.dtype, model.attention, model.quantization",
        "trust_remote_code": (
            "models that bring their own code are not loaded: use one that transformers itself implements"
        ),
        "chat_template_path": "set model.chat_template",
        "pad_token": "TRL is about to remove it; the tokenizer's own pad token is used, or its end-of-text token",
    },
)
