"""Know the time before you spend it: the roofline of a model, a capacity planner, a cluster simulator. No torch."""
