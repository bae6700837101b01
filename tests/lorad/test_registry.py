"""Registration: whichever of wadi and PEFT is imported first, and however the type is looked up."""

import copy
import pickle
import subprocess
import sys

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from wadi.lorad import LoRaDConfig, LoRaDModel
from wadi.lorad.registry import add_peft_type, register

READS_A_CONFIG = "c = peft.get_peft_config({'peft_type': 'LORAD', 'r': 3}); assert type(c).__name__ == 'LoRaDConfig'"


@pytest.mark.parametrize(
    "imports",
    [
        "import wadi, peft",
        "import peft, wadi",
        "import wadi.lorad, peft",
        "import wadi, importlib.util; importlib.util.find_spec('peft'); import peft",  # as libraries probe for it
    ],
)
def test_either_order_of_import_registers(imports):
    subprocess.run([sys.executable, "-c", f"{imports}; {READS_A_CONFIG}"], check=True, timeout=300)


def test_importing_the_package_imports_neither_torch_nor_peft():
    code = "import sys, wadi; assert not {'torch', 'peft', 'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_type_is_an_enum_member_like_any_other():
    member = PeftType.LORAD
    assert member is PeftType("LORAD") is PeftType["LORAD"] is add_peft_type("LORAD")
    assert member in list(PeftType)
    assert list(PeftType).count(member) == 1
    assert member == "LORAD"
    assert (member.name, member.value) == ("LORAD", "LORAD")
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert {member: 1}["LORAD"] == 1
    assert repr(member) == "<PeftType.LORAD: 'LORAD'>"


def test_registration_is_done_once_and_leaves_another_implementation_alone(monkeypatch):
    assert PEFT_TYPE_TO_PREFIX_MAPPING["LORAD"] == "lorad_"
    register(LoRaDConfig, LoRaDModel)
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.LORAD, object)
    register(LoRaDConfig, LoRaDModel)
    assert PEFT_TYPE_TO_TUNER_MAPPING["LORAD"] is object


def test_the_model_status_names_it():
    import torch

    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRaDConfig(r=1, target_modules=["0"]))
    assert model.get_model_status().peft_types == {"default": "LORAD"}
