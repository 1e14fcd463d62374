"""Fields that only PEFT has: taken where they say nothing, refused by name where they ask for something."""

import pytest

from lora_core import LoraConfig, VeraConfig
from lora_core.errors import ConfigError
from lora_core.spec.peft_fields import NOT_HERE, OF_A_START, ONLY, WITHOUT_MEANING

PLAIN = LoraConfig(r=4, target_modules=["q"])
EMPTY = (None, False, "", [], {})


@pytest.mark.parametrize(
    "fields",
    [
        {"fan_in_fan_out": True},
        {"fan_in_fan_out": False},
        {"peft_type": "LORA"},
        {"auto_mapping": {"base_model_class": "Net", "parent_library": "nets"}},
        {"revision": "main", "peft_version": "0.18.0"},
        {"runtime_config": print},
        {"merge_weights": True},
        {"megatron_core": "megatron.core", "qalora_group_size": 16},
        {"inference_mode": False},
        {"init_weights": True},
    ],
    ids=str,
)
def test_a_field_that_says_nothing_is_taken(fields):
    assert LoraConfig(r=4, target_modules=["q"], **fields) == PLAIN


@pytest.mark.parametrize("value", EMPTY, ids=repr)
@pytest.mark.parametrize("name", [*NOT_HERE, *sorted(WITHOUT_MEANING), *OF_A_START])
def test_an_empty_value_asks_for_nothing(name, value):
    assert LoraConfig(r=4, target_modules=["q"], **{name: value}) == PLAIN


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_asks_for_something_that_is_not_here_is_refused_with_its_value_and_the_reason(name):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**{name: {"some": "thing"}})
    assert f"{name}={{'some': 'thing'}}" in str(caught.value) and NOT_HERE[name] in str(caught.value)


@pytest.mark.parametrize("name", OF_A_START)
def test_settings_of_a_start_that_is_not_taken_are_told(name):
    with pytest.warns(UserWarning, match=f"{name} is not used: it is for init_lora_weights='{OF_A_START[name]}'") as caught:
        assert LoraConfig(r=4, target_modules=["q"], **{name: {"a": 1}}) == PLAIN
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["cls", "self", "args", "use_magic"])
def test_an_unknown_field_is_refused_with_its_value(name):
    with pytest.raises(ConfigError, match=rf"LoraConfig has no field '{name}' \(given 7\)"):
        LoraConfig(**{name: 7})


@pytest.mark.parametrize(("form", "kind"), [(LoraConfig, "VERA"), (LoraConfig, "IA3"), (VeraConfig, "LORA")])
def test_another_kind_of_adapter_is_refused(form, kind):
    with pytest.raises(ConfigError, match=f"peft_type is '{kind}', and {form.__name__} is for '{form.peft_type}'"):
        form(peft_type=kind)


def test_a_field_with_one_value_has_no_other():
    with pytest.raises(ConfigError, match="init_weights must be True, not False"):
        VeraConfig(init_weights=False)


def test_each_field_stands_in_one_table_and_is_none_of_ours():
    tables = [NOT_HERE.keys(), WITHOUT_MEANING, OF_A_START.keys(), ONLY.keys()]
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))
    assert not set(names) & set(LoraConfig.__dataclass_fields__)


def test_enums_are_taken_for_their_values():
    peft = pytest.importorskip("peft")
    config = LoraConfig(task_type=peft.TaskType.SEQ_CLS, peft_type=peft.PeftType.LORA)
    assert config == LoraConfig(task_type="SEQ_CLS") and type(config.task_type) is str


def test_what_is_refused_is_listed_for_the_reader():
    from tests.support import ROOT

    page = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    assert [name for name in NOT_HERE if f"`{name}`" not in page] == []


@pytest.mark.parametrize("name", ["alora_invocation_tokens", "layer_replication"])
def test_an_empty_list_asks_for_nothing(name):
    assert LoraConfig(r=4, target_modules=["q"], **{name: []}) == PLAIN
