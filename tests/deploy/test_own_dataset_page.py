"""docs/bring-your-own-dataset.md, run as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "bring-your-own-dataset.md"


@pytest.mark.slow
@pytest.mark.e2e
def test_the_page_works_as_it_stands(tmp_path: Path) -> None:
    """Its blocks in order, in an empty folder, end with a model, masks and a report; and it is short."""
    text = PAGE.read_text()
    assert len(text.splitlines()) < 60
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MEDSEGFED_CACHE": str(tmp_path / "cache"),
    }
    blocks = re.findall(r"```(python|bash)\n(.*?)```", text, flags=re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "bash", "bash", "bash"]
    for language, code in blocks:
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
        ran = subprocess.run(  # noqa: PLW1510 - the status is asserted below, with what was printed
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
    for made in ("alone/model.safetensors", "masks/p0_mask.nii.gz", "run/report.json", "run/model.safetensors"):
        assert (tmp_path / made).is_file()
