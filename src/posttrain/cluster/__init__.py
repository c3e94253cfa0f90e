"""The same stages on Ray: training on several workers, rollouts on actors of their own."""
