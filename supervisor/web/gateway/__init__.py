"""The gateway: a client's SDK speaks its provider's API to us, and is answered as its provider would answer.

We supervise, we do not translate: a request goes to an upstream that speaks the same API, its bytes unchanged but for the name of the
model where that upstream has another, and what comes back is passed on byte for byte. Between the two is a stream like any other:
journaled, stored, bounded, retried and resumed before anything was lost, shown to operators, and cancelled when its client leaves.

- `config.py`: `[gateway]`;
- `apis.py`: how each API tells errors and frames events;
- `asked.py`: a request, understood, and the call to an upstream that it becomes;
- `relay.py`: a stream's journal, told to a client;
- `service.py`: whose request it is, where it goes, and the routes.
"""

from supervisor.web.gateway.config import GatewayClient, GatewayConfig, GatewayRoute
from supervisor.web.gateway.service import gateway

__all__ = ["GatewayClient", "GatewayConfig", "GatewayRoute", "gateway"]
