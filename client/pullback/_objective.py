"""`Objective`: a hosted function as optimisers over flat vectors want one."""
