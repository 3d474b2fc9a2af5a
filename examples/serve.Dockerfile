# The similarity service, from a wheel of this package and an exported model:
#   pip wheel --no-deps -w dist . && cp image.onnx dist/
#   docker build -f examples/serve.Dockerfile -t similarity dist
#   docker run --rm --read-only --tmpfs /tmp --cap-drop ALL -p 127.0.0.1:8000:8000 similarity
FROM python:3.12-slim
COPY *.whl /wheels/
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    "$(ls /wheels/*.whl)[serve,cli]" && rm -r /wheels && useradd --system service
COPY image.onnx /model/
USER service
EXPOSE 8000
HEALTHCHECK CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
# Inside the container it listens on all addresses; the port is published on the host's loopback above.
CMD ["lightning-contrast", "serve", "/model/image.onnx", "--host", "0.0.0.0", "--port", "8000"]
