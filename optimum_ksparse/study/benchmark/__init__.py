"""How fast sparse layers and models are beside dense ones, on the machine at hand.

`optimum-cli ksparse bench`, or `python -m optimum_ksparse bench` where optimum is not installed.
"""

from .layers import bench_layers
from .models import MODELS, bench_model, layer_shapes
from .results import FIGURE_NAME, RESULTS_NAME, BenchResults, draw_speedup, weights_of
from .run import BenchSettings, run
