"""The CUDA kernels, run by Triton's interpreter on the CPU, and a CPU path that does without Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="there are no Triton wheels for other systems")
@pytest.mark.parametrize("script", ["check_triton.py", "check_triton_step.py"])
def test_kernels_equal_dense_products(script: str) -> None:
    """Values, ragged and empty rows, explicit zeros, odd sizes; both dtypes. Then whole steps."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = [sys.executable, str(HERE / script)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


def test_a_cpu_step_never_imports_triton() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); sys.modules['triton'] = None\n"
        "from tiny_transcoder import make_batch, make_model\n"
        "from clt.train.step import train_step\n"
        "print(float(train_step(make_model(), [make_batch(9, 0)], lambda *_: None).loss) > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
