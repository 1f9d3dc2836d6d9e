# One image for every process of navstream; the command says which. See compose.yaml.
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

WORKDIR /app

# Dependencies first: their layer is built anew only when the locks change.
COPY requirements.txt requirements-setup.txt ./
RUN pip install --require-hashes -r requirements-setup.txt \
    && pip install --require-hashes -r requirements.txt

COPY pyproject.toml README.md schema.graphql navstream.py ./
COPY alembic alembic
COPY engine engine
COPY resolvers resolvers
COPY workers workers
COPY api api
RUN pip install --no-deps --no-build-isolation --editable . \
    && useradd --system --no-create-home --shell /usr/sbin/nologin navstream

USER navstream
EXPOSE 8000
ENTRYPOINT ["navstream"]
CMD ["api"]
