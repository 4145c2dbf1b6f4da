"""What :func:`dlkernels.convert` does to a model.

classes.py    classes that replace PyTorch's, and methods that replace other people's
patterns.py   which modules in a row run as one op, decided at each call
forward.py    a subclass of a user's class whose methods run such rows as one op
rewrite.py    the source of such a method
convert.py    convert() and revert()
report.py     report()
"""
