"""`python -m imagine_flash`, and what the command `imagine-flash` starts: as little as possible before an interrupt is caught."""

import sys


def main() -> None:
    try:
        from imagine_flash.cli import main as run

        run()
    except KeyboardInterrupt:  # during the imports too
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
