"""Work on torch's own threads, for passes over memory that are not torch operations.

`spread(work, count, elements=n)` calls work(begin, end) over [0, count) on several threads if n
elements are worth them; what one of them raises is raised when all have ended.
"""

from aadp_kernels._cpu._threads import spread

__all__ = ["spread"]
