"""Studies: a grid of methods, patterns, calibration sets and seeds, each cell pruned and measured in a process of its
own, and the tables and figures of what came of it. An application of the library: nothing in it imports this."""

from .figures import write_figures
from .grid import Place, grid
from .quantities import NSMC_TASKS, TABLES, Spread, spread
from .recipe import RECIPE_KEYS, Recipe
from .results import CellResult, Row, StudyResults, load_study
from .run import list_cells, run_study, tabulate_study
from .tables import markdown, write_tables
