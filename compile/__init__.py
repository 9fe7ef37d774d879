"""From a model's modules to code that runs a step: trace, passes, lower, all before the first request."""
