"""What was compiled, and how accurate it is. Nothing of the layer imports this."""

from jaxlinear.inspect._explain import Collective as Collective
from jaxlinear.inspect._explain import CompiledProduct as CompiledProduct
from jaxlinear.inspect._explain import Explanation as Explanation
from jaxlinear.inspect._explain import Saved as Saved
from jaxlinear.inspect._explain import explain as explain
