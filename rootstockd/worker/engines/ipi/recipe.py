"""What the catalogue says of a program that dials in, checked.

The entry's `arguments`:

============= ======================================================================================================
command       the program and its arguments, a list; no shell is involved
files         input files by name, each a template (`templates`), written into the program's folder before it starts
variables     environment variables, beside those of the daemon
element       what templates may say of each element: `element.Cu = { mass = 63.546, pseudopotential = "Cu.UPF" }`
stress        whether what it sends as virial is one: many programs send zeros unless their input asks for stress
cell          `any`, or `triangular` for programs that want a along x and b in the xy plane
pbc           for which periodicity the input is: a list of `TTT` for crystals, `FFF` for molecules...; or `any`
grouped       whether atoms of one element have to come together, as in VASP's POSCAR
strain        how far a cell may be from that which the program was started with, until it is started anew
programs      how many there may be, each with a system of its own
parallel      how many of them compute at a time; structures of one system get copies of its program
start_timeout seconds from its start until it has to be connected
sha256        of the program's file; another is not started
============= ======================================================================================================

What templates can name: `socket` (of which `/tmp/ipi_` and this is the path), `natoms`, `nelements`, `charge`,
`spin`; `lx`, `ly`, `lz`, `xy`, `xz`, `yz` of a triangular cell; the section `cell`, three vectors with `x`, `y`, `z`;
the section `atoms` with `index` and `type`, both from 1, `symbol`, `number`, `x`, `y`, `z`; the section `elements` of
those that the structure has, with `type`, `symbol`, `number`, `count`. All are Å. In the latter two sections there is
also what `element` says.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Sequence, Tuple

from rootstockd.worker.engines.ipi.templates import Known, Template, TemplateError

_TABLE = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb "
    "Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au "
    "Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts "
    "Og"
)
SYMBOLS = _TABLE.split()
"""By atomic number; an engine's environment may have no ASE."""
NOT_OF_NUMBERS = ("programs", "parallel", "start_timeout")
"""Arguments that change no result, and so no fingerprint."""

_VECTOR: Known = dict.fromkeys("xyz")
_TRIANGULAR = ("lx", "ly", "lz", "xy", "xz", "yz")
_SYSTEM = ("socket", "natoms", "nelements", "charge", "spin")
_SPECIES = ("type", "symbol", "number")
_OURS = {*_SYSTEM, *_TRIANGULAR, *_SPECIES, *_VECTOR, "index", "count", "cell", "atoms", "elements"}
_VARIABLE_NAME = re.compile(r"[^=\0]+")
_FILE_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Recipe:
    """One entry's arguments."""

    command: Tuple[Template, ...]
    program: str
    """The first word of the command."""
    files: Dict[str, Template]
    variables: Dict[str, Template]
    element: Dict[str, Dict[str, Any]]
    stress: bool
    triangular: bool
    pbc: Tuple[Tuple[bool, ...], ...]
    grouped: bool
    strain: float
    programs: int
    parallel: int
    start_timeout: float
    sha256: str

    @property
    def understood(self) -> Tuple[str, ...]:
        """Which of charge and spin its input says."""
        templates = [*self.command, *self.files.values(), *self.variables.values()]
        return tuple(word for word in ("charge", "spin") if any(word in template.names for template in templates))


def read_recipe(arguments: Mapping[str, Any], elements: Sequence[str]) -> Recipe:
    """An entry's arguments, if they make sense.

    Args:
        arguments: as the catalogue has them.
        elements: symbols of those that the entry has.

    Raises:
        ValueError: what does not.
    """
    given = dict(arguments)
    if not elements:
        raise ValueError('a program does not say which elements its input is for: elements = ["Cu"]')
    element = _element(given.pop("element", {}), elements)
    triangular = _choice(given, "cell", {"any": False, "triangular": True}, "any")
    known = _known(element, triangular=triangular)
    command = given.pop("command", None)
    if not (isinstance(command, list) and command and all(isinstance(word, str) and word for word in command)):
        raise ValueError('command = ["PROGRAM", "ARGUMENT"] is needed, a list of texts; no shell splits one')
    variables = _texts(given.pop("variables", {}), "variables")
    if strange := sorted(name for name in variables if not _VARIABLE_NAME.fullmatch(name)):
        raise ValueError(f"variables: {strange[0]!r} is no name of an environment variable")
    if any("\0" in text for text in (*command, *variables.values())):
        raise ValueError("command and variables can't have a NUL in them")
    if "{{" in command[0]:
        raise ValueError("which program runs can't depend on a structure")
    files = _texts(given.pop("files", {}), "files")
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"files: {name!r} is no name of a file in the program's own folder")
    recipe = Recipe(
        command=tuple(_template(word, known, f"command {word!r}") for word in command),
        program=command[0],
        files={name: _template(text, known, f"files: {name}") for name, text in files.items()},
        variables={name: _template(text, known, f"variables: {name}") for name, text in variables.items()},
        element=element,
        stress=_choice(given, "stress", {True: True, False: False}, default=False),
        triangular=triangular,
        pbc=_pbc(given.pop("pbc", ["TTT"])),
        grouped=_choice(given, "grouped", {True: True, False: False}, default=False),
        strain=_number(given, "strain", 0.05),
        programs=int(_number(given, "programs", 4, whole=True)),
        parallel=int(_number(given, "parallel", 1, whole=True)),
        start_timeout=_number(given, "start_timeout", 60.0),
        sha256=_sha256(given.pop("sha256", "")),
    )
    if given:
        raise ValueError(f"no such arguments: {', '.join(sorted(given))}")
    _check_whole(recipe)
    return recipe


def _check_whole(recipe: Recipe) -> None:
    if recipe.parallel > recipe.programs:
        raise ValueError(f"parallel = {recipe.parallel} needs as many programs, and programs = {recipe.programs}")
    if not any("socket" in t.names for t in (*recipe.command, *recipe.files.values(), *recipe.variables.values())):
        raise ValueError("nothing tells the program where to connect: {{socket}} in its command, a file or a variable")


def _known(element: Dict[str, Dict[str, Any]], *, triangular: bool) -> Known:
    """The names that templates may use."""
    said = set.intersection(*(set(fields) for fields in element.values()))  # of each element, or it may lack one day
    fields: Known = dict.fromkeys(said)
    species: Known = dict.fromkeys(_SPECIES)
    known: Known = dict.fromkeys(_SYSTEM)
    known.update(dict.fromkeys(_TRIANGULAR) if triangular else {})
    known.update(
        cell=_VECTOR,
        atoms={**fields, **species, **_VECTOR, "index": None},
        elements={**fields, **species, "count": None},
    )
    return known


def _element(table: Any, elements: Sequence[str]) -> Dict[str, Dict[str, Any]]:
    if not isinstance(table, dict) or not all(isinstance(fields, dict) for fields in table.values()):
        raise ValueError("element is a table for each symbol: element.Cu = { mass = 63.546 }")
    if strange := sorted(set(table) - set(elements)):
        raise ValueError(f"element: {', '.join(strange)} is not among the entry's elements")
    for symbol, fields in table.items():
        for name, value in fields.items():
            if name in _OURS:
                raise ValueError(
                    f"element.{symbol}.{name}: {{{{{name}}}}} has a meaning of its own; choose another name"
                )
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise ValueError(f"element.{symbol}.{name} is neither a text nor a number")  # noqa: TRY004 - as all that is wrong
    return {symbol: table.get(symbol, {}) for symbol in elements}


def _texts(table: Any, what: str) -> Dict[str, str]:
    if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
        raise ValueError(f'{what} is a table of texts: {what} = {{ "NAME" = "..." }}')
    return table


def _template(text: str, known: Known, where: str) -> Template:
    try:
        return Template(text, known)
    except TemplateError as error:
        raise ValueError(f"{where}: {error}") from error


def _choice(given: Dict[str, Any], name: str, choices: Mapping[Any, bool], default: Any) -> bool:
    value = given.pop(name, default)
    if not isinstance(value, type(default)) or value not in choices:
        words = " or ".join(str(choice).lower() for choice in choices)
        raise ValueError(f"{name} is {words}")
    return choices[value]


def _number(given: Dict[str, Any], name: str, default: float, *, whole: bool = False) -> float:
    value = given.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value > 0:
        raise ValueError(f"{name} is a {'whole ' if whole else ''}number above 0")
    return float(value)


def _pbc(given: Any) -> Tuple[Tuple[bool, ...], ...]:
    if given == "any":
        return tuple(itertools.product((True, False), repeat=3))
    if not (isinstance(given, list) and given and all(re.fullmatch("[TF]{3}", str(text)) for text in given)):
        raise ValueError('pbc is "any" or a list such as ["TTT"]: T for a periodic direction and F for an open one')
    return tuple(tuple(letter == "T" for letter in text) for text in given)


def _sha256(given: Any) -> str:
    if given and not re.fullmatch("[0-9a-fA-F]{64}", str(given)):
        raise ValueError("sha256 has 64 hexadecimal digits, as `sha256sum` says them")
    return str(given).lower()
