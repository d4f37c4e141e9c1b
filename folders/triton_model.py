"""What the model for prompts in a Triton repository is called and takes: `export/triton_repository.py` writes its
configuration, `engine/triton_model.py` answers its requests."""

from __future__ import annotations

NAME = "text_to_image"
INPUTS = {  # of one picture each; all but the first may be left out
    "PROMPT": "TYPE_STRING",
    "NEGATIVE_PROMPT": "TYPE_STRING",
    "SEED": "TYPE_INT64",
    "STEPS": "TYPE_INT32",
    "HEIGHT": "TYPE_INT32",
    "WIDTH": "TYPE_INT32",
    "GUIDANCE": "TYPE_FP32",
}
IMAGES, SEED = "IMAGES", "SEED"  # what it gives: uint8 (B, H, W, 3), and int64 (B, 1)
CODE = "from imagine_flash.engine.triton_model import TritonPythonModel  # noqa: F401  (the server looks for it here)\n"
