"""How the op runs: its formulas, and their products on each platform. JAX is enough."""
