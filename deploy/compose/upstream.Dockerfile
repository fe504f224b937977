# syntax=docker/dockerfile:1
# The simulator of upstream APIs: the server's image, which compose.yaml calls `paceline`, with what the simulator needs.
FROM paceline
USER 0
COPY requirements/upstream.txt /tmp/upstream.txt
RUN python -m pip --python /opt/paceline/bin/python install --no-cache-dir --require-hashes --only-binary :all: --no-deps \
        -r /tmp/upstream.txt \
    && rm /tmp/upstream.txt
USER 10001:10001
EXPOSE 7180
CMD ["upstream", "--host=0.0.0.0", "--port=7180"]
