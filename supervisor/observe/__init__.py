"""What can be seen of a supervisor from outside: figures, the overview, and the trace of a stream.

`Figures(supervisor)` counts what becomes of its streams; `overview` and the `exposition` for Prometheus
are made of it. `trace` reads what happened in one stream from its journal. OpenTelemetry is an extra: `supervisor.observe.spans`.
"""

from supervisor.observe.distribution import Distribution, Percentiles
from supervisor.observe.exposition import exposition
from supervisor.observe.figures import Figures
from supervisor.observe.logged import StreamLog
from supervisor.observe.overview import Overview, overview
from supervisor.observe.perfetto import chrome_trace
from supervisor.observe.timeline import Trace
from supervisor.observe.tracing import trace

__all__ = [
    "Distribution",
    "Figures",
    "Overview",
    "Percentiles",
    "StreamLog",
    "Trace",
    "chrome_trace",
    "exposition",
    "overview",
    "trace",
]
