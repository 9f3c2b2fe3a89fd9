# A model behind HTTP. The tests do not build this file.
#
#   docker build -t hf-llmopt .
#   docker run --rm -p 8000:8000 hf-llmopt
#   docker run --rm -p 8000:8000 --gpus all -v models:/models hf-llmopt Qwen/Qwen2.5-0.5B-Instruct --llmopt int4
#
# Whoever reaches the port may use the server unless keys are given: -e HF_LLMOPT_API_KEYS=... lets in those that know one.

FROM python:3.12-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY constraints.txt pyproject.toml setup.cfg setup.py README.md LICENSE ./
COPY hf_llmopt hf_llmopt
# The kernels hold code for every processor and choose at run time, so the image runs on others than the one that built it.
RUN pip install --no-cache-dir -c constraints.txt build && python -m build --wheel --outdir /wheels

FROM python:3.12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt "$(ls /wheels/*.whl)[serve]"
# Models are kept outside the container's own layer, and nothing runs as root.
RUN useradd --create-home llmopt && mkdir /models && chown llmopt /models
USER llmopt
ENV HF_HOME=/models
VOLUME /models
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["hf-llmopt", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["demo"]
