"""
How the methods of the field are compared: settings, methods, one training run (a cell), many of them side by side, and
what is made of their figures. `compare_methods.py`, `tune_methods.py`, `study.py` and `results_page.py` are the commands.
"""
