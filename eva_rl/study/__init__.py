"""Many runs -> methods compared: tables, 95 % confidence intervals, pictures, a document."""

from eva_rl.study.compare import Comparison, compare, compared
from eva_rl.study.document import document, save_report
from eva_rl.study.read import pack, read_results
from eva_rl.study.study import Study

__all__ = ["Comparison", "Study", "compare", "compared", "document", "pack", "read_results", "save_report"]
