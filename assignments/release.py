"""Make what learners get, assignments/release/, from assignments/source/.

    python assignments/release.py [NAME ...]
"""

import argparse
import sys

from grading import course


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", help="an assignment, such as 02_math; all by default")
    names = parser.parse_args(arguments).name or course.assignments()
    for name in names:
        if name not in course.assignments():
            parser.error(f"no assignment {name!r}; there are {', '.join(course.assignments())}")
    for name in names:
        try:
            course.generate(name)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        print(course.released(name).relative_to(course.HERE.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
