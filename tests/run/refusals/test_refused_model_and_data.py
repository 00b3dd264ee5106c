import pytest
from refused_settings import CAUSAL, IMAGES, refusal

NO_ANSWERS = (
    "model.task=causal_lm needs prompts with answers: dataset=chat or dolly, or another with "
    "dataset.answer_column and dataset.template"
)


def images(task: str, source: str) -> str:
    return (
        f"model.task={task} with dataset.source={source}: image_classification "
        "(model=vit_digits_random) needs images, dataset=digits, and images need it"
    )


REFUSED = [
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
    *(
        (
            ["ranks=from_memory", *strategy],
            f"ranks=from_memory: {strategy[0]} trains lora.max_rank on every client, whatever its "
            "rank; take ranks with tiers",
        )
        for strategy in (
            ["strategy=flasc"],
            ["strategy=lora_a2"],
            ["strategy=hafl", "strategy.selection_by=client"],
        )
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
    (
        ["client.tokens_per_step=500"],
        "client.tokens_per_step=500: it counts tokens of answers, model.task is classification; "
        "expected 0",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), REFUSED, ids=lambda value: str(value)[:60])
def test_is_refused_in_one_line(overrides, line):
    assert refusal(*overrides) == line
