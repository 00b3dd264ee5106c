"""Names that people know from Flower, PEFT and transformers, and what they are called here.

They are hints in the line that refuses such a name; none of them is accepted.
"""

from collections.abc import Container, Mapping
from typing import Final

MODEL: Final = "model=encoder model.path={} (a language model: model=causal)"
"""How a base model of the hub, or a folder, is given."""

_CALLED: Final[Mapping[str, str]] = {
    "federation.num_rounds": "rounds num_rounds n_rounds num_server_rounds server_rounds",
    "federation.num_clients": "clients num_clients n_clients num_nodes num_supernodes"
    " num_partitions min_available_nodes min_available_clients min_train_nodes min_fit_clients",
    "federation.fraction_train": "fraction_fit fraction participation",
    "federation.early_stopping.patience": "patience early_stopping early_stopping_patience",
    "federation.early_stopping.min_delta": "min_delta early_stopping_threshold",
    "client.local_epochs": "epochs n_epochs num_epochs num_train_epochs local_epochs",
    "client.max_steps": "steps local_steps",
    "client.learning_rate": "lr learning_rate client_lr local_lr",
    "client.schedule.kind": "lr_scheduler_type lr_scheduler lr_schedule scheduler schedule",
    "client.schedule.warmup_rounds": "warmup warmup_rounds warmup_steps warmup_ratio",
    "client.batch_size": "bs batch batch_size train_batch_size per_device_train_batch_size",
    "client.tokens_per_step": "tokens_per_step tokens_per_batch batch_tokens max_tokens",
    "client.micro_batch_size": "gradient_accumulation_steps",
    "client.optimizer": "optim",
    "client.proximal": "mu proximal_mu fedprox_mu",
    "client.logit_adjustment": "balanced_softmax logit_adjust",
    "federation.server_optimizer.learning_rate": "server_lr server_learning_rate eta",
    "client.weight_decay": "wd",
    "client.max_grad_norm": "grad_clip clip_grad",
    "client.device": "device gpu cuda use_gpu",
    "client.precision": "bf16 fp16 dtype torch_dtype",
    "lora.max_rank": "r rank lora_r lora_rank max_rank",
    "lora.scaling=rslora": "use_rslora",
    "lora.lora_alpha or partition.dirichlet_alpha": "alpha",
    "partition.dirichlet_alpha": "dirichlet beta",
    "model.head": "modules_to_save",
    "model.quantization": "load_in_4bit load_in_8bit quantization_config",
    MODEL.format("..."): "model_name_or_path model_name model_id base_model checkpoint"
    " base_model_name_or_path pretrained_model_name_or_path",
    "dataset": "dataset_name",
    "dataset.path": "data data_path dataset_path train_file",
    "dataset.test_path": "test_file",
    "dataset.max_length": "max_len max_length max_seq_length seq_len",
    "strategy": "method algorithm algo aggregator",
    "privacy.noise_multiplier": "noise sigma",
    "privacy.max_epsilon": "epsilon eps",
    "tracking": "report_to logger tracker",
    "output_dir": "output out save_dir logdir",
    "seed": "random_seed random_state",
}
"""What people call a setting, by how it is given here."""

SETTINGS: Final = {word: here for here, words in _CALLED.items() for word in words.split()}
CHOICES: Final[Mapping[str, Mapping[str, str]]] = {
    "strategy": {
        **dict.fromkeys(("fedavg", "avg", "lora"), "strategy=fedit"),
        "fedprox": "client.proximal=0.01",
        **dict.fromkeys(("fedlc", "fedrs"), "client.logit_adjustment=1 or 0"),
        "scaffold": "federation.scaffold=true",
        "fedavgm": "federation.server_optimizer.kind=momentum",
        "fedadam": "federation.server_optimizer.kind=adam",
        "fedyogi": "federation.server_optimizer.kind=yogi",
    },
    "partition": dict.fromkeys(("non_iid", "noniid", "skewed"), "partition=dirichlet"),
    "privacy": {
        **dict.fromkeys(("dp", "true"), "privacy=central_dp or local_dp"),
        **dict.fromkeys(("secagg", "secagg+", "secaggplus"), "privacy=secure_aggregation"),
    },
}
"""What people call the files of a group, and how they are given here."""

_DATA_FILES: Final = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


def habit(name: str) -> str:
    """Return how to give what ``name`` may have meant; empty if it is no one's habit.

    A group before it (``client.lr``, ``lora.r``), hyphens and capitals make no difference.
    """
    group, _, bare = name.lstrip("+~-").replace("-", "_").lower().rpartition(".")
    meant = SETTINGS.get(bare, "")
    return next((one for one in meant.split(" or ") if one.startswith(f"{group}.")), meant)


def choice_habit(group: str, value: str) -> str:
    """Return how to give what ``group=value`` may have meant; empty if it is no one's habit."""
    if known := CHOICES.get(group, {}).get(value.replace("-", "_").lower()):
        return known
    if group == "model" and "/" in value:
        return MODEL.format(value)
    if group == "dataset" and ("/" in value or value.endswith(_DATA_FILES)):
        return f"dataset=local dataset.path={value}"
    return ""


def as_override(flag: str, value: str, known: Container[str]) -> str:
    """Return what to type for a setting that was given as a flag, e.g. ``--rounds 3``.

    Empty for a flag that is neither one of the ``known`` settings nor anyone's habit.
    """
    name, _, given = flag.lstrip("-").replace("-", "_").partition("=")
    meant = name if name in known else habit(name)
    return meant if not meant or "=" in meant else f"{meant}={given or value or '...'}"
