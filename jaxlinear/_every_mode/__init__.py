"""Every mode of differentiation for an op with a custom VJP.

This folder imports nothing else of the package: copy it to use it.
"""

from jaxlinear._every_mode import jet as jet
from jaxlinear._every_mode.levels import Term as Term
from jaxlinear._every_mode.linear_map import linear_map_p as linear_map_p
from jaxlinear._every_mode.op import every_mode_p as every_mode_p
from jaxlinear._every_mode.op import in_every_mode as in_every_mode
