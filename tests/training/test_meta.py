"""An update stays on its device: the loop, with a model on the meta device, where a mix of devices is an error."""

import pytest

from tests.training.helpers import launch, write_config, write_image_config

PROGRAM = "tests/training/on_meta.py"


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("train_llm.py", ()),
        ("train_llm.py", ("--train.micro_batch_size", 2, "--data.document_mask", "true")),
        ("train_llm.py", ("--train.max_grad_norm", 0, "--model.tie_word_embeddings", "true")),
        pytest.param("train_imagenet.py", (), marks=pytest.mark.exhaustive),
        ("train_imagenet.py", ("--train.label_smoothing", 0.1, "--train.micro_batch_size", 2)),
    ],
)
def test_an_update_stays_on_its_device(tmp_path, program, arguments):
    write = write_config if program == "train_llm.py" else write_image_config
    options = ("--config", write(tmp_path), "--run_dir", tmp_path / "run", *arguments)
    assert "three updates on the meta device" in launch(*options, program, program=PROGRAM)
