"""The command `dit-lens lab`."""

from __future__ import annotations

from .commands import Name, On
from .output import say


def lab(
    model: Name, machine: On, host: str = "127.0.0.1", port: int = 7860, names: tuple[str, ...] = ()
) -> None:
    """Open a page on which clicks mask, exchange or scale heads, and the image is drawn anew.

    `dit-lens lab rte-micro`.

    Args:
        model: bundled name (`dit-lens models`), pipeline folder, folder of a training run, or hub
            id.
        machine: device and precision, see `Machine`.
        host: address to listen at; by default, this machine alone can reach the page.
        port: port; 0 for any that is free.
        names: further host names under which the page is visited, such as me-lab.hf.space.
    """
    from ..lab import Lab, serve
    from ..lab.server import LOOPBACK

    server = serve(Lab(machine.load(model), model), host, port, (*LOOPBACK, *names))
    say(
        f"http://{'localhost' if host in LOOPBACK else host}:{server.server_address[1]}  (ctrl-c "
        "ends it)"
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
