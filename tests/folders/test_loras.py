"""What a LoRA is called, on the command line and in requests."""

import pytest

from imagine_flash.core.errors import ArtifactError
from imagine_flash.folders.loras import Lora, parse_named


def test_a_name_goes_before_the_path_and_a_weight_behind() -> None:
    typed = ["pixel=a/b.safetensors:0.8", "./x=y/ink.v2.safetensors", "owner/name:-1", "night sky = C:\\n.safetensors"]
    assert parse_named(typed) == {
        "pixel": Lora("a/b.safetensors", 0.8),
        "ink.v2": Lora("./x=y/ink.v2.safetensors"),
        "name": Lora("owner/name", -1.0),
        "night sky": Lora("C:\\n.safetensors"),
    }


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["a=x", "a=y"], r"two LoRAs are called 'a'; give one another name: NAME=y"),
        (["a/x.safetensors", "b/x.safetensors"], r"two LoRAs are called 'x'.*NAME=b/x\.safetensors"),
        (["<a>=x"], r"a LoRA's name has up to 100 letters, digits, spaces and \._\+\(\)-, got '<a>'"),
        (["=x"], r"a LoRA's name has .*got ''; NAME=PATH gives one"),
        (["a" * 101 + "=x"], r"a LoRA's name has up to 100"),
        (["a="], r"a LoRA is PATH or PATH:WEIGHT"),
        (["x.safetensors:abc"], r"got 'x\.safetensors:abc': the weight 'abc' is no number"),
        (["owner/name:nan"], r"the weight 'nan' is no number"),
        (["x.safetensors:"], r"the weight '' is no number"),
        (["a=x:1.2.3"], r"a LoRA is PATH or PATH:WEIGHT such as .*got 'x:1\.2\.3'"),
    ],
)
def test_what_is_no_name(typed: list[str], says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        parse_named(typed)
