"""`python -m hfft`, and so `accelerate launch -m hfft`."""

from hfft.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
