"""What `import hf_wash` offers, and what it does not load."""

import subprocess
import sys

import hf_wash


def test_public_names():
    for name in hf_wash.__all__:
        assert getattr(hf_wash, name).__name__ == name
    assert set(hf_wash.__all__) <= set(dir(hf_wash))
    assert not hasattr(hf_wash, "NoSuchMixer")


def test_a_loop_of_ones_own_needs_no_transformers():
    code = "import sys; from hf_wash import WashMixer, uniform_soup; print('transformers' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert printed.stdout.strip() == "False"


def test_help_needs_no_torch():
    code = "import sys, hf_wash.cli; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert printed.stdout.strip() == "False"
