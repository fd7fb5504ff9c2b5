"""What Python runs first where this folder is on its path: processes of a server know the stand-in `seeing`."""

from pathlib import Path

import pace.models

pace.models.MODELS["seeing"] = "Seeing"
pace.models.__path__.append(str(Path(__file__).parent))
