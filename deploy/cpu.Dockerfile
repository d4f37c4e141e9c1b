# The server on processors. From the checkout's root:
#   docker build -f deploy/cpu.Dockerfile -t imagine-flash . && docker run -p 127.0.0.1:8000:8000 imagine-flash
FROM python:3.12-slim-bookworm AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm
COPY --from=build /wheels /wheels
# hadolint ignore=DL3013
RUN set -- /wheels/*.whl && pip install --no-cache-dir "$1[serve]" && rm -r /wheels \
    && useradd --system --uid 10001 --create-home imagine
USER 10001
ENV IMAGINE_FLASH_CACHE=/home/imagine/cache PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz')"]
ENTRYPOINT ["imagine-flash", "serve", "--host", "0.0.0.0"]
