"""Every refused combination of settings, in one table."""

import pytest
from running import TINY

from hafl_app.config.compose import SettingsError, compose
from hafl_app.run.checks import (
    PRIVACY_NEEDS,
    SCAFFOLD_NEEDS,
    SECURE_NEEDS,
    STREAMING_NEEDS,
    check_base_alone,
    check_centralized,
    check_comparison,
    check_settings,
)

CAUSAL = ("model=tiny_random_causal", "dataset=dolly", "dataset.path=folder")
IMAGES = "experiment=digits"
CROSS_CLIENT = "because one client's upload would change how the others count"
ONE_RELEASE = "because a repeated round is one more release than epsilon counts"
NEW = "it makes new components in every round, of which those before say nothing"
SCAFFOLD = ("client=sgd", "client.max_grad_norm=0", "federation.scaffold=true")
LONE_OFF = ("federation.alone_clients_per_rank=0", "federation.max_retries=0")
WHOLE_ROUND = "it compares all replies of a round, and streaming drops each at once"
COHORT = "federation.cohort={}{}"
LOCAL_DP = (
    *("privacy=local_dp", "federation.fraction_evaluate=0", "federation.max_retries=0"),
    "federation.alone_clients_per_rank=0",
)
TOGETHER = ("engine=inprocess", "federation.cohort=4")
NO_BITS = (
    "federation.upload=mixed: only strategy=haflq gives every component its bits; expected fp32, "
    "bf16 or int8"
)
NO_ANSWERS = (
    "model.task=causal_lm needs prompts with answers: dataset=chat or dolly, or another with "
    "dataset.answer_column and dataset.template"
)


CLOSED = "model.head=closed_form"
NO_NOISE = "since sums of features are uploaded without noise; expected averaged, frozen or local"
A_NUMBER = "a number as model.closed_form.temperature"
BY_CLIENTS = f"expected model.closed_form.temperature_by=clients, or {A_NUMBER}"


def images(task: str, source: str) -> str:
    return (
        f"model.task={task} with dataset.source={source}: image_classification "
        "(model=vit_digits_random) needs images, dataset=digits, and images need it"
    )


NO_CLOCK = "devices=none has no clock; expected devices=mixed"
SECURE = ("privacy=secure_aggregation", "strategy=zero_padding")
SINGLE = "it needs single updates, and the server has their sums alone"
NO_CLIPPING = "clipping needs single updates, and noise is counted without sums"


def secure(needed, given, reason):
    return f"privacy.secure_aggregation=true needs {needed}, not {given}: {reason}"


REFUSED = [
    # simulated devices
    (["devices.deadline_s=3"], f"devices.deadline_s=3.0: {NO_CLOCK}"),
    (["devices.jitter=0.1"], f"devices.jitter=0.1: {NO_CLOCK}"),
    (["devices.target=0.8"], f"devices.target=0.8: {NO_CLOCK}"),
    (["devices.assign=share"], f"devices.assign=share: {NO_CLOCK}"),
    (
        [
            *("devices=mixed", "devices.classes.server_gpu.up_to_rank=6"),
            *("lora.max_rank=16", "ranks=two_to_sixteen"),
        ],
        "devices: no class affords rank 16; expected one whose up_to_rank is null or at least 16, "
        "or devices.assign=share",
    ),
    (
        ["devices=mixed", "privacy=central_dp", "strategy=zero_padding"],
        "devices: refused under privacy=central_dp, because the clock follows from the lengths of "
        "the clients' texts, and carries no noise",
    ),
    (
        ["devices=mixed", "model.head=closed_form", "strategy=zero_padding"],
        "model.head=closed_form: the clock of devices counts no sums of features; "
        "expected devices=none",
    ),
    (
        ["devices=mixed", "client.max_seconds=5"],
        "client.max_seconds=5: seconds of this machine, not of the clock of devices; expected 0, "
        "devices.deadline_s ends the wait for stragglers",
    ),
    # a password is not repeated, and not written
    (
        ["tracking=mlflow", "tracking.uri=https://me:open-sesame@host"],
        "tracking.uri: it names a user or a password; give them as MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD in the environment",
    ),
    # clients that train together
    (["federation.cohort=many"], COHORT.format("many", ": expected auto or a whole number from 1")),
    (["federation.cohort=0"], COHORT.format("0", ": expected auto or a whole number from 1")),
    (["federation.cohort=1.5"], COHORT.format("1.5", ": expected auto or a whole number from 1")),
    (
        ["federation.cohort=4", "federation.client_gpus=0.5"],
        COHORT.format(
            "4",
            " needs federation.client_gpus=null, not 0.5: one process for each GPU, or one on the "
            "CPU, trains them all",
        ),
    ),
    (
        ["federation.cohort=4", "federation.client_cpus=2"],
        COHORT.format(
            "4",
            " needs federation.client_cpus=null, not 2: one process for each GPU, or one on the "
            "CPU, trains them all",
        ),
    ),
    (
        ["federation.cohort=4", "federation.ray_address=10.0.0.1:6379"],
        COHORT.format("4", " needs federation.ray_address=null: it takes a Ray of the run's own"),
    ),
    (
        [*TOGETHER, "client.max_seconds=5"],
        COHORT.format("4", " needs client.max_seconds=0: a time limit is each client's own"),
    ),
    (
        [*TOGETHER, "client.micro_batch_size=2"],
        COHORT.format("4", " needs client.micro_batch_size=null: memory is short then"),
    ),
    (
        [*TOGETHER, "lora.lora_dropout=0.1"],
        COHORT.format("4", " needs lora.lora_dropout=0: the masks would be others than alone"),
    ),
    (
        [*TOGETHER, "model.dropout=true"],
        COHORT.format("4", " needs model.dropout=false: the masks would be others than alone"),
    ),
    (
        [*TOGETHER, *LOCAL_DP],
        COHORT.format(
            "4", ": under privacy=local_dp a node's noise depends on the last bit it uploads"
        ),
    ),
    (
        [*TOGETHER, "model.quantization=blockwise"],
        COHORT.format(
            "4", " needs another model.quantization: under blockwise every client has its own base"
        ),
    ),
    (
        [*TOGETHER, "strategy=ravan"],
        COHORT.format("4", ": clients of strategy=ravan train cores, each in a model of its own"),
    ),
    # model and data
    (["model=vit_digits_random"], images("image_classification", "synthetic")),
    (["model=vit_digits_random", "dataset=on_device"], images("image_classification", "on_device")),
    (["dataset=digits"], images("classification", "digits")),
    (["model=tiny_random_causal", "dataset=digits"], images("causal_lm", "digits")),
    (
        [IMAGES, "model.pooling=mean"],
        "model.pooling=mean: an image classifier has a head of its own, expected cls",
    ),
    (
        [IMAGES, "ranks=from_memory"],
        "ranks=from_memory: the memory of a training step is not counted for images; take ranks "
        "with tiers",
    ),
    (["model=tiny_random_causal"], NO_ANSWERS),
    (
        ["model=tiny_random_causal", "dataset=on_device"],
        "model.task=causal_lm with dataset=on_device learns the nodes' conversations; expected "
        "dataset.format=chat",
    ),
    (
        ["dataset=chat", "dataset.path=folder"],
        "dataset.format=chat: answers are learned by a model=causal, model.task is classification",
    ),
    (
        [*CAUSAL, "model.chat_template=chatlm"],
        "model.chat_template=chatlm: expected one of instruction, chatml, or a Jinja template; did "
        "you mean 'chatml'?",
    ),
    (
        ["dataset=dolly", "dataset.path=folder"],
        "dataset.answer_column=response: answers are learned by a model=causal, model.task is "
        "classification",
    ),
    (
        [*CAUSAL, "model.head=local"],
        "model.head=local: a causal language model has no head",
    ),
    # heads in closed form
    (
        [*CAUSAL, CLOSED],
        f"{CLOSED}: a causal language model has no head; expected averaged",
    ),
    (
        ["strategy=zero_padding", "privacy=central_dp", CLOSED],
        f"{CLOSED}: refused under privacy=central_dp, {NO_NOISE}",
    ),
    ([*LOCAL_DP, CLOSED], f"{CLOSED}: refused under privacy=local_dp, {NO_NOISE}"),
    (
        ["federation.robust=median", CLOSED],
        f"{CLOSED}: refused with federation.robust=median, since sums of features are added up; "
        "expected none",
    ),
    (
        ["dataset.validation_fraction=0", CLOSED],
        f"{CLOSED}: dataset.validation_fraction=0 leaves nothing to choose on; {BY_CLIENTS}",
    ),
    (
        ["federation.central_evaluation=false", CLOSED],
        f"{CLOSED}: with federation.central_evaluation=false the server has no model to choose "
        f"with; {BY_CLIENTS}",
    ),
    (
        [
            *("dataset.validation_fraction=0", CLOSED, "model.closed_form.temperature=0.1"),
            "model.closed_form.ridge_by=validation",
        ],
        f"{CLOSED}: dataset.validation_fraction=0 leaves nothing to choose on; expected "
        "model.closed_form.ridge_by=gcv, or a number as model.closed_form.ridge",
    ),
    (
        [CLOSED, "federation.num_rounds=0", "model.closed_form.per_rank=true", *LONE_OFF],
        "model.closed_form.per_rank=true: with federation.num_rounds=0 there is no adapter to cut, "
        "all ranks have one head; expected false",
    ),
    (
        ["dataset=on_device", CLOSED],
        f"{CLOSED}: dataset=on_device has no validation data; {BY_CLIENTS}",
    ),
    (
        ["dataset.holdout_fraction=0", CLOSED, "model.closed_form.temperature_by=clients"],
        "model.closed_form.temperature_by=clients: they score rows that they hold out; expected "
        "dataset.holdout_fraction above 0",
    ),
    (
        ["federation.num_rounds=0"],
        "federation.num_rounds=0: nothing is trained; expected at least 1, or "
        "model.head=closed_form, which is solved before round 1",
    ),
    (
        ["federation.num_rounds=0", CLOSED, "federation.alone_clients_per_rank=1"],
        "federation.alone_clients_per_rank=1: with federation.num_rounds=0 nothing is trained; "
        "expected 0",
    ),
    # federation
    (
        ["federation.unseen_clients=5"],
        "federation.unseen_clients=5: expected below federation.num_clients=5",
    ),
    (
        ["federation.unseen_clients=2", "model.head=local"],
        "federation.unseen_clients=2: with model.head=local they would have an untrained head",
    ),
    (
        ["federation.unseen_clients=2", "strategy=zero_padding", "privacy=central_dp"],
        "federation.unseen_clients=2: refused under privacy=central_dp, whose guarantee and "
        "denominators count every client",
    ),
    (
        ["federation.generate_examples=3"],
        "federation.generate_examples=3: answers are generated by a model.task=causal_lm only",
    ),
    (
        [*CAUSAL, "federation.generate_examples=3", "federation.central_evaluation=false"],
        "federation.generate_examples=3 needs federation.central_evaluation=true",
    ),
    (
        ["federation.generate_on_clients=3"],
        "federation.generate_on_clients=3: answers are generated by a model.task=causal_lm only",
    ),
    (
        [*CAUSAL, "federation.generate_on_clients=3", "federation.fraction_evaluate=0"],
        "federation.generate_on_clients=3: the clients that evaluate write them; expected "
        "federation.fraction_evaluate above 0",
    ),
    (
        [*CAUSAL, "federation.generate_on_clients=3", "dataset.holdout_fraction=0"],
        "federation.generate_on_clients=3: clients answer prompts that they hold out; expected "
        "dataset.holdout_fraction above 0",
    ),
    (
        ["federation.watch_prompts=[hello]"],
        "federation.watch_prompts (1 given): answers are generated by a model.task=causal_lm only",
    ),
    (
        [*CAUSAL, "federation.watch_prompts=[hello]", "federation.central_evaluation=false"],
        "federation.watch_prompts (1 given) needs federation.central_evaluation=true: the server "
        "has no model",
    ),
    (
        [*CAUSAL, "federation.watch_prompts=[hello,' ']"],
        "federation.watch_prompts: number 2 is blank",
    ),
    (
        [*CAUSAL, "federation.watch_prompts=[hello,bye,hello]"],
        "federation.watch_prompts: 'hello' is there twice",
    ),
    (
        [*CAUSAL, f"federation.watch_prompts=[{','.join(f'p{i}' for i in range(17))}]"],
        "federation.watch_prompts (17 given): expected at most 16, they are answered after every "
        "round",
    ),
    (["strategy=hafl", "federation.upload=mixed"], NO_BITS),
    (["strategy=flexlora", "federation.upload=mixed"], NO_BITS),
    (
        ["federation.streaming=true", "federation.max_norm_ratio=null", "federation.robust=median"],
        f"federation.streaming=true needs federation.robust=none, not median: {WHOLE_ROUND}",
    ),
    (
        ["federation.streaming=true", "federation.max_norm_ratio=5"],
        f"federation.streaming=true needs federation.max_norm_ratio=null, not 5.0: {WHOLE_ROUND}",
    ),
    (
        ["federation.streaming=true", "federation.max_norm_ratio=null", "federation.clip_ratio=2"],
        f"federation.streaming=true needs federation.clip_ratio=null, not 2.0: {WHOLE_ROUND}",
    ),
    (
        ["strategy=flexlora_change", "federation.server_optimizer.kind=adam"],
        f"federation.server_optimizer.kind=adam is refused for strategy=flexlora: {NEW}",
    ),
    (
        ["strategy=fedex_lora", "federation.server_optimizer.kind=momentum"],
        "federation.server_optimizer.kind=momentum is refused for strategy=fedex_lora: it merges "
        "into the base what the mean of a round lacks, which another step belies",
    ),
    (
        ["strategy=hafl", "federation.server_optimizer.learning_rate=0.1"],
        "federation.server_optimizer.learning_rate=0.1 has no effect with "
        "federation.server_optimizer.kind=none, expected momentum or adam or yogi",
    ),
    (
        ["federation.server_optimizer.kind=momentum", "federation.server_optimizer.tau=0.1"],
        "federation.server_optimizer.tau=0.1 has no effect with "
        "federation.server_optimizer.kind=momentum, expected adam or yogi",
    ),
    (
        ["strategy=flora", *SCAFFOLD],
        "federation.scaffold=true is refused for strategy=flora: it merges into the base what the "
        "mean of a round lacks, which another step belies",
    ),
    *(
        (
            [*SCAFFOLD, f"{name}={value}", *others],
            f"federation.scaffold=true needs {name}={off}, not {value}: {SCAFFOLD_NEEDS[name][1]}",
        )
        for name, off, value, *others in (
            ("client.optimizer", "sgd", "adamw"),
            ("client.max_grad_norm", "0.0", "1.0"),
            ("client.weight_decay", "0.0", "0.1"),
            ("client.proximal", "0.0", "0.1"),
            ("lora.scaling", "constant", "rslora"),
            ("federation.upload", "fp32", "int8"),
            ("federation.clip_ratio", "null", "2.0"),
            ("federation.robust", "none", "median"),
            ("privacy.kind", "none", "local_dp", "federation.fraction_evaluate=0", *LONE_OFF),
        )
    ),
    (
        ["client.schedule.warmup_rounds=2"],
        "client.schedule.warmup_rounds=2: expected below federation.num_rounds=2, else no round "
        "has client.learning_rate",
    ),
    *(
        (
            ["federation.early_stopping.patience=3", *others],
            "federation.early_stopping.patience=3: neither the server nor the clients score rounds "
            "that it could stop by; expected 0, or dataset.validation_fraction above 0 with "
            "federation.central_evaluation=true",
        )
        for others in (
            ["dataset.validation_fraction=0", "federation.fraction_evaluate=0"],
            ["federation.central_evaluation=false", "dataset.holdout_fraction=0"],
            [
                *("dataset.validation_fraction=0", "privacy=central_dp"),
                *("federation.max_retries=0", "federation.max_norm_ratio=null"),
            ],
        )
    ),
    (
        ["client.tokens_per_step=500"],
        "client.tokens_per_step=500: it counts tokens of answers, model.task is classification; "
        "expected 0",
    ),
    (
        ["engine=inprocess", "federation.ray_address='head:6379'"],
        "federation.ray_address: engine=inprocess uses no Ray; drop either",
    ),
    # privacy
    (
        ["privacy=central_dp", "federation.robust=median"],
        f"federation.robust=median: privacy=central_dp needs none, {CROSS_CLIENT}",
    ),
    (
        ["privacy=central_dp", "federation.clip_ratio=2"],
        f"federation.clip_ratio=2.0: privacy=central_dp needs null, {CROSS_CLIENT}; "
        "privacy.clip_norm clips",
    ),
    (
        ["privacy=central_dp", "federation.max_norm_ratio=10"],
        f"federation.max_norm_ratio=10.0: privacy=central_dp needs null, {CROSS_CLIENT}",
    ),
    (
        ["privacy=central_dp", "federation.min_replies=3"],
        "federation.min_replies=3: privacy=central_dp needs 1, because whether a round counts "
        "would tell how many took part",
    ),
    (
        ["privacy=central_dp", "federation.max_retries=2"],
        f"federation.max_retries=2: privacy=central_dp needs 0, {ONE_RELEASE}",
    ),
    (
        ["privacy=local_dp", "federation.fraction_evaluate=1"],
        "federation.fraction_evaluate=1.0: privacy=local_dp needs 0.0, because scores on private "
        "data would be uploaded without noise",
    ),
    (
        ["privacy=local_dp", "federation.alone_clients_per_rank=2"],
        "federation.alone_clients_per_rank=2: privacy=local_dp needs 0, because training alone is "
        "one more upload than epsilon counts",
    ),
    (
        ["privacy=local_dp", "federation.max_retries=1"],
        f"federation.max_retries=1: privacy=local_dp needs 0, {ONE_RELEASE}",
    ),
    # secure aggregation
    ([*SECURE, "privacy.kind=local_dp"], secure("privacy.kind=none", "local_dp", NO_CLIPPING)),
    ([*SECURE, "federation.robust=median"], secure("federation.robust=none", "median", SINGLE)),
    (
        [*SECURE, "federation.max_norm_ratio=5"],
        secure("federation.max_norm_ratio=null", "5.0", SINGLE),
    ),
    ([*SECURE, "federation.clip_ratio=2"], secure("federation.clip_ratio=null", "2.0", SINGLE)),
    ([*SECURE, "federation.scaffold=true"], secure("federation.scaffold=False", "True", SINGLE)),
    (
        [*SECURE, "federation.streaming=true"],
        secure("federation.streaming=False", "True", "a sum is opened when all have answered"),
    ),
    (
        [*SECURE, "federation.upload=int8"],
        secure("federation.upload=fp32", "int8", "masked numbers cannot be rounded further"),
    ),
    (
        [*SECURE, "federation.alone_clients_per_rank=1"],
        secure(
            "federation.alone_clients_per_rank=0",
            "1",
            "who trains alone would upload without a mask",
        ),
    ),
    (
        [*SECURE, "model.head=closed_form"],
        "model.head=closed_form: refused with privacy.secure_aggregation=true, since sums of "
        "features are uploaded without masks; expected averaged, frozen or local",
    ),
    *(
        (
            ["privacy=secure_aggregation", *f"strategy={name}".split()],
            f"privacy.secure_aggregation=true is refused for strategy={name.split()[0]}: {reason}",
        )
        for name, reason in {
            "flexlora": "it needs single updates, not their sums",
            "flora": "it needs single updates, not their sums",
            "hetlora": "training decides the rank of an upload, after masks are agreed on: use "
            "strategy.pruning=false",
            "hafl": "its server scores single updates: use strategy.importance=magnitude, or "
            "strategy.selection=random or prefix",
            "hafl strategy.selection_by=client": "clients choose, and it divides by who has "
            "chosen a component, which is hidden: use strategy.aggregation=change "
            "strategy.coverage_exponent=1, or strategy.selection_by=server",
            "hafl_plus": "its server assigns components by what single updates contributed: use "
            "strategy.selection=random or prefix",
            "flasc": "where its uploads have numbers is not masked, and without it they are as "
            "large as all factors: use strategy=zero_padding",
            "fedara": "clients upload importance scores, one by one",
        }.items()
    ),
]


def settings(*overrides: str):
    tiny = [o for o in TINY if not o.startswith(("model=", "dataset"))]
    own = {o.partition("=")[0] for o in overrides} | {"experiment"}
    base = [] if IMAGES in overrides else ["model=tiny_random", "dataset=synthetic"]
    return compose([*(o for o in base if o.partition("=")[0] not in own), *tiny, *overrides])


@pytest.mark.parametrize(("overrides", "line"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_does_not_go_together_is_refused_in_one_line(overrides, line):
    with pytest.raises(SettingsError) as caught:
        check_settings(settings(*overrides))
    assert str(caught.value) == line


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        CAUSAL,
        [IMAGES],
        ["strategy=haflq"],
        ["strategy=zero_padding", "privacy=central_dp"],
        ["privacy=local_dp"],
        SECURE,
        ["privacy=secure_aggregation", "strategy=hafl", "strategy.selection=prefix"],
        ["privacy=secure_aggregation", "strategy=hetlora", "strategy.pruning=false"],
        ["privacy=secure_aggregation", "strategy=lora_a2"],
        ["privacy=secure_aggregation", "strategy=hafl_plus", "strategy.selection=random"],
        ["federation.unseen_clients=2"],
        [*CAUSAL, "federation.generate_examples=3"],
        [*CAUSAL, "federation.generate_on_clients=3", "federation.central_evaluation=false"],
        [*CAUSAL, "federation.watch_prompts=[hello]"],
        [*CAUSAL, "federation.watch_prompts=[]", "federation.central_evaluation=false"],
        ["federation.watch_prompts=[]"],
        ["federation.streaming=true", "federation.max_norm_ratio=null"],
        ["strategy=hafl", "federation.server_optimizer.kind=yogi"],
        ["federation.server_optimizer.kind=adam", "federation.server_optimizer.tau=0.1"],
        ["strategy=flexlora", "client.proximal=0.1"],
        [*SCAFFOLD, "federation.server_optimizer.kind=momentum"],
        [CLOSED],
        [CLOSED, "federation.num_rounds=0"],
        [CLOSED, "dataset.validation_fraction=0", "model.closed_form.temperature=0.1"],
        [CLOSED, "dataset.validation_fraction=0", "model.closed_form.temperature_by=clients"],
        ["engine=inprocess"],
        ["federation.ray_address='head:6379'"],
    ],
    ids=str,
)
def test_what_goes_together_passes(overrides):
    check_settings(settings(*overrides))


def test_the_table_has_every_need():
    lines = [line for _, line in REFUSED]
    needs = {f"privacy={kind} needs": PRIVACY_NEEDS[kind] for kind in PRIVACY_NEEDS}
    needs["federation.streaming=true needs"] = STREAMING_NEEDS
    needs["federation.scaffold=true needs"] = SCAFFOLD_NEEDS
    needs["privacy.secure_aggregation=true needs"] = SECURE_NEEDS
    for words, table in needs.items():
        of_table = [line for line in lines if words in line]
        assert len(of_table) == len(table)
        assert all(any(f"{name}=" in line for line in of_table) for name in table)


@pytest.mark.parametrize(
    ("overrides", "searches", "line"),
    [
        (["model.head=local"], False, "model.head=local: there is no global model to compare"),
        (
            ["dataset.validation_fraction=0"],
            True,
            "dataset.validation_fraction=0: nothing to tune on; add tune=false",
        ),
    ],
)
def test_what_cannot_be_compared(overrides, searches, line):
    with pytest.raises(SettingsError) as caught:
        check_comparison(settings(*overrides), searches)
    assert str(caught.value) == line
    check_comparison(settings(*(o for o in overrides if "head" not in o)), searches_rates=False)


def test_what_cannot_be_centralized():
    with pytest.raises(SettingsError, match="centralized training learns its head by gradients"):
        check_centralized(settings(CLOSED))
    check_centralized(settings())


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["model=tiny_random"],
            "adapter=none: only a model.task=causal_lm can be scored alone, the head of a "
            "classification model is trained with its adapter",
        ),
        (
            [*CAUSAL, "model.quantization=blockwise"],
            "model.quantization=blockwise: that is each client's own choice; expected none, int8 "
            "or nf4",
        ),
    ],
)
def test_what_cannot_be_scored_alone(overrides, line):
    with pytest.raises(SettingsError) as caught:
        check_base_alone(settings(*overrides))
    assert str(caught.value) == line
    check_base_alone(settings(*CAUSAL))
