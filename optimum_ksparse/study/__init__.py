"""Studies: a grid of methods, patterns, calibration sets and seeds, each cell pruned and measured in a process of its
own, and the tables and figures of what came of it."""

from .figures import draw_calibration, draw_patterns, draw_time
from .grid import Cell, Place, grid
from .output import write_figures, write_tables
from .quantities import QUANTITIES, TABLES
from .recipe import RECIPE_KEYS, Recipe
from .results import CellResult, Row, StudyResults, load_study
from .run import list_cells, run_study, tabulate_study, write_study
from .spread import Spread, spread
from .tables import markdown

__all__ = [
    "QUANTITIES",
    "RECIPE_KEYS",
    "TABLES",
    "Cell",
    "CellResult",
    "Place",
    "Recipe",
    "Row",
    "Spread",
    "StudyResults",
    "draw_calibration",
    "draw_patterns",
    "draw_time",
    "grid",
    "list_cells",
    "load_study",
    "markdown",
    "run_study",
    "spread",
    "tabulate_study",
    "write_figures",
    "write_study",
    "write_tables",
]
