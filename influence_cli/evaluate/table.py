"""The protocols, one line each."""

from influence_cli.evaluate import agreement, deletion, lds, mislabel, tsloo
from influence_cli.evaluate.declaration import Protocol

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        tsloo.PROTOCOL,
        lds.PROTOCOL,
        deletion.PROTOCOL,
        mislabel.PROTOCOL,
        agreement.PROTOCOL,
    )
}
