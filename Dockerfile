# EquiAV's image: an environment in /opt/equiav over a plain Python, to run as nobody in particular on a read-only root.
#
#   docker build -t equiav .                     # buildah, podman, docker with BuildKit
#
# Where packages come from elsewhere: --build-arg PIP_INDEX_URL=..., or, with credentials or a certificate authority,
# --secret id=pip.conf,src=pip.conf --secret id=ca.crt,src=ca.crt (pip.conf then says `cert = /run/secrets/ca.crt`).
# Neither is in the image: it takes only files from the stages that install.
#
# BASE needs python3 >= 3.11 with venv: /usr/local/bin/python3, or Debian's /usr/bin/python3. All stages use it: the
# environment has to find in the last what it was made with.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# What to install, in a stage of its own: an edit to pyproject.toml that changes no dependency installs nothing again.
FROM ${BASE} AS requirements
COPY pyproject.toml /
RUN python3 -c 'import tomllib; p = tomllib.load(open("/pyproject.toml", "rb"))["project"]; \
    extras = p["optional-dependencies"]; print(*p["dependencies"], *extras["prep"], *extras["smoke"], sep="\n")' \
    > /requirements.txt

FROM ${BASE} AS dependencies
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
COPY constraints.txt /
COPY --from=requirements /requirements.txt /
# pip compiles what it installs. It has no work after this.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt \
    python3 -m venv /opt/equiav \
    && /opt/equiav/bin/pip install --no-cache-dir --disable-pip-version-check -c /constraints.txt -r /requirements.txt \
    && /opt/equiav/bin/pip check \
    && /opt/equiav/bin/pip uninstall --yes pip

# The project by itself: what a node pulls for a new version of it are megabytes, not the 5 GB beside it.
FROM ${BASE} AS project
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
COPY . /source
# The environment is empty, and there for its path: the first line of bin/equiav names it.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt \
    python3 -m venv /opt/equiav \
    && /opt/equiav/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps --prefix /project /source

FROM ${BASE}
# Python's own modules too: a base may come without their bytecode, and no start can write it here.
RUN groupadd --gid 10001 equiav \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp --shell /usr/sbin/nologin equiav \
    && python3 -m compileall -q -x '/(tests?|lib2to3|site-packages|dist-packages)/' \
        "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
COPY --from=dependencies /opt/equiav /opt/equiav
COPY --from=project /project /opt/equiav
# /tmp is what can be written: home, and where a relative path leads.
ENV PATH=/opt/equiav/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
WORKDIR /tmp
USER 10001:10001
CMD ["equiav", "--help"]
ARG SOURCE=
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="EquiAV" \
      org.opencontainers.image.description="Audio-visual contrastive pretraining with equivariance" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
