"""How fast sparse layers and models are beside dense ones, on the machine at hand.

`optimum-cli ksparse bench`, or `python -m optimum_ksparse bench` where optimum is not installed.
"""

from .figure import FIGURE_NAME, draw_speedup
from .layers import bench_layers
from .models import bench_model
from .results import RESULTS_NAME, BenchResults
from .run import BenchSettings, run
from .shapes import MODELS, layer_shapes
