"""What the chain costs, as a ratio to bare mitmdump; `run.py` is `make bench`.

Two real proxies, one with the chain and one that only streams and routes (`bare.py`), get the
same load in turn from this process (`load`) and send it to the same provider (`provider`). CPU is
read from the operating system. What is measured and how it is judged is in `scenarios`.
"""
