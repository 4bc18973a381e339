"""The lab on a Hugging Face Space, or on any machine that others visit.

    DIT_LENS_MODEL=rte-micro SPACE_HOST=me-lab.hf.space python app.py

A Space sets SPACE_HOST itself. README.md and the Dockerfile beside this file make it a Space.
"""

from __future__ import annotations

import os

from dit_lens.lab import Lab, serve
from hooked_models import HookedTextToImage


def main(port: int = 7860) -> None:
    """Serve the lab until the process ends."""
    name = os.environ.get("DIT_LENS_MODEL", "rte-micro")
    lab = Lab(HookedTextToImage.from_pretrained(name), name)
    serve(lab, "0.0.0.0", port, (os.environ["SPACE_HOST"],)).serve_forever()


if __name__ == "__main__":
    main()
