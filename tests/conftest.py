import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real networks and data sets, named by OCSQUANT_DATA or beside the checkout."""
    folder = Path(os.environ.get("OCSQUANT_DATA", Path(__file__).parents[1] / "../shared/data"))
    if not folder.is_dir():
        pytest.skip("no evaluation data: set OCSQUANT_DATA")
    return folder
