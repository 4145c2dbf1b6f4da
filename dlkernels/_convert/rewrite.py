"""The source of a function, compiled again with the ReLU after a layer in one call with it.

``relu(conv(x))`` then reads ``self._dlkernels_chain([(relu, (), {})], conv, x)``, and nothing else
differs. Which functions and modules these are is looked up when it runs, as before. So it is the
same program, with its flags, branches and side effects, which a trace by torch.fx would not be.
"""

import ast
import copy
import functools
import linecache
import warnings
from types import CodeType

import torch

from . import patterns
from .classes import ORIGINALS
from .patterns import METHOD_RELUS, POOLS, RELUS, is_one_of


def rewrite(function, module):
    """The code of a method of `module` that has ReLUs, and pools after them, in chains.

    Returns:
        code, the chains, None; or None, no chains and, if the method calls PyTorch's ReLU as a
        function or may do so, why that is not in a chain. A chain is (texts, row): the source of
        the layer and of each step, and what they are now, as :func:`patterns.match` takes them.
    """
    code = function.__code__
    found = _find(code, code.co_filename)
    if isinstance(found, str):
        return None, [], found
    tree, node = found
    rewriter = _Rewriter(module, code, function.__globals__)
    new = rewriter.generic_visit(copy.deepcopy(node))
    if rewriter.chains:
        return _compile(tree, node, new.body, code), rewriter.chains, None
    why = "no ReLU in its forward comes right after a Linear or Conv2d" if rewriter.others else None
    return None, [], why


def uses_its_class(function):
    """Why a method can't be called on an instance of a subclass that is to pass for the class, or
    None: it asks for the class of self, and not only for an attribute of it or to call it."""
    code = function.__code__
    if not names(code) & {"__class__", "type"} or not code.co_argcount:
        return None
    found = _find(code, code.co_filename)
    if isinstance(found, str):
        return found.replace("forward", code.co_name)
    _, node = found
    harmless = {
        id(n.value if isinstance(n, ast.Attribute) else n.func)
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute | ast.Call)
    }
    for n in ast.walk(node):
        for child in ast.iter_child_nodes(n):
            if _is_class_of(child, code.co_varnames[0]) and id(child) not in harmless:
                return f"its {code.co_name} says {ast.unparse(n)}, which a subclass would change"
    return None


def _is_class_of(expression, me):
    """Whether this is ``self.__class__`` or ``type(self)``."""
    match expression:
        case ast.Attribute(value=ast.Name(id=name), attr="__class__"):
            return name == me
        case ast.Call(func=ast.Name(id="type"), args=[ast.Name(id=name)]):
            return name == me
    return False


class _Rewriter(ast.NodeTransformer):
    """Rewrites statements of a function of `module`; lists the chains, and counts the ReLUs of
    PyTorch's functions and methods that are in none."""

    def __init__(self, module, code, variables):
        self.module, self.variables = module, variables
        self.me = code.co_varnames[0]
        self.locals = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
        self.chains, self.others = [], 0

    def visit_Call(self, node):
        self.generic_visit(node)
        step, x = self._step(node)
        if step is None:
            return node
        self.others += step.is_function
        return self._chain(x, step, node) or node

    def generic_visit(self, node):
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, self.merge(statements))
        return node

    def merge(self, statements):
        """Makes one statement of ``x = conv(x)`` and ``x = relu(x)``."""
        result = []
        for now in statements:
            name = _assigned(now)
            if name and result and _assigned(result[-1]) == name:
                step, x = self._step(now.value)
                if step and isinstance(x, ast.Name) and x.id == name:
                    chain = self._chain(result[-1].value, step, now.value)
                    if chain:
                        now.value = chain
                        result.pop()
            result.append(now)
        return result

    def _step(self, call):
        """A ReLU or a pool as a step of a chain, and what it is applied to; or None, None."""
        f, args, keywords = call.func, call.args, call.keywords
        text = ast.unparse(f)
        if isinstance(f, ast.Attribute) and f.attr in METHOD_RELUS and not (args or keywords):
            text, value = f.attr, f.attr
            f, x, args, is_relu, is_function = ast.Constant(f.attr), f.value, [], True, True
        else:
            value = self._value(f)
            is_function = is_one_of(value, RELUS)
            is_relu = is_function or _kind(value) is torch.nn.ReLU
            is_pool = is_one_of(value, POOLS) or _kind(value) is torch.nn.MaxPool2d
            others = [*args[1:], *(k.value for k in keywords)]
            if not (is_relu or is_pool) or not args or not all(map(_is_constant, others)):
                return None, None
            if not all(k.arg for k in keywords):
                return None, None
            x, args = args[0], args[1:]
        kwargs = ast.Dict([ast.Constant(k.arg) for k in keywords], [k.value for k in keywords])
        step = ast.Tuple([f, ast.Tuple(args, ast.Load()), kwargs], ast.Load())
        step.is_relu, step.is_function, step.text = is_relu, is_function, self._name(text)
        step.value = patterns.as_step(value, *map(ast.literal_eval, (step.elts[1], kwargs)))
        return step, x

    def _chain(self, x, step, place):
        """A call of _chain for step(x), if x is a layer's and step a ReLU, or x a ReLU's chain and
        step a pool; else None."""
        if not step.is_relu:
            if not hasattr(x, "chain") or len(x.args[0].elts) > 1:
                return None
            x.args[0].elts.append(step)
            texts, row = x.chain
            texts.append(step.text)
            row.append(step.value)
        elif isinstance(x, ast.Call) and self._is_layer(x.func):
            name = ast.Attribute(ast.Name(self.me, ast.Load()), "_dlkernels_chain", ast.Load())
            texts = [self._name(ast.unparse(x.func)), step.text]
            chain = texts, [self._value(x.func), step.value]
            x = ast.Call(name, [ast.List([step], ast.Load()), x.func, *x.args], x.keywords)
            x.chain = chain
            self.chains.append(chain)
            self.others -= step.is_function
        else:
            return None
        return ast.fix_missing_locations(ast.copy_location(x, place))

    def _value(self, expression):
        """What a name, or an attribute of one, is now; None for the function's own variables."""
        if isinstance(expression, ast.Attribute):
            of = self._value(expression.value)
            if isinstance(of, torch.nn.Module):  # no property is called
                return of._modules.get(expression.attr, vars(of).get(expression.attr))
            return getattr(of, expression.attr, None)
        if not isinstance(expression, ast.Name):
            return None
        if expression.id == self.me:
            return self.module
        return None if expression.id in self.locals else self.variables.get(expression.id)

    def _is_layer(self, f):
        """Whether f, which is called, may be a Linear or Conv2d: one by name, or from a list."""
        if isinstance(f, ast.Name):
            return f.id in self.locals
        if isinstance(f, ast.Subscript):
            return isinstance(self._value(f.value), torch.nn.Module)
        return ORIGINALS.get(type(self._value(f))) in (torch.nn.Linear, torch.nn.Conv2d)

    def _name(self, text):
        """The source of a step, of a module as model.named_modules() calls it."""
        return text.removeprefix(f"{self.me}.")


def _kind(module):
    """PyTorch's class in whose place the class of a module is, or that class."""
    return ORIGINALS.get(type(module), type(module))


def _assigned(statement):
    """The name in ``name = f(...)``."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call()):
            return name
    return None


def _is_constant(expression):
    if isinstance(expression, ast.Tuple | ast.List):
        return all(map(_is_constant, expression.elts))
    return isinstance(expression, ast.Constant)


def _codes(code):
    """A code object and those of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def names(code):
    """The globals and attributes that a function, or one inside of it, names."""
    return {name for c in _codes(code) for name in c.co_names}


@functools.lru_cache(maxsize=64)
def _find(code, filename):  # two files may have equal code
    """(the tree of the file, the function's node in it), or why there is none."""
    linecache.checkcache(filename)
    text = "".join(linecache.getlines(filename))
    if not text:
        return "the source of its forward is not to be had"
    try:
        tree = ast.parse(text)
        compiled = _compile_tree(tree, code)
    except (SyntaxError, ValueError):
        compiled = None
    if compiled != code:
        return "the source of its forward is not what runs: it was edited since"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if first == code.co_firstlineno and not _is_odd(node, code.co_varnames):
                return tree, node
    return "its forward is no plain method: asynchronous, a lambda, or it binds self anew"


def _is_odd(node, variables):
    """Whether the name of the first argument may mean something else, or any name a global."""
    first, me = [*node.args.posonlyargs, *node.args.args, None][0], variables[0]
    return first is None or any(
        isinstance(n, ast.Global | ast.Nonlocal)
        or (isinstance(n, ast.Name) and n.id == me and not isinstance(n.ctx, ast.Load))
        or (isinstance(n, ast.arg) and n.arg == me and n is not first)
        for n in ast.walk(node)
    )


def _compile_tree(tree, code):
    """The function of the same name and line as `code` in the compiled file, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the file's own compilation had to say
        compiled = compile(tree, code.co_filename, "exec", dont_inherit=True)
    for c in _codes(compiled):
        if (c.co_name, c.co_firstlineno) == (code.co_name, code.co_firstlineno):
            return c
    return None


def _compile(tree, node, body, code):
    before = node.body
    try:
        node.body = body
        return _compile_tree(tree, code)
    finally:
        node.body = before
