// Runs the page's codec for the Python tests: a job as JSON comes in, what the page makes of it goes out as JSON.
// Numbers are written n/d in lowest terms, or -0, inf, -inf, nan.

import { readFileSync } from "node:fs";
import { store } from "../../../src/fewbits/report/page/block.js";
import { parse as formatNamed } from "../../../src/fewbits/report/page/by_name.js";
import { decode, encode, neighbours, ulp } from "../../../src/fewbits/report/page/codec.js";
import { Format } from "../../../src/fewbits/report/page/format.js";
import { exactly, parse } from "../../../src/fewbits/report/page/literal.js";
import { fromNumber, rational, reduced, toNumber } from "../../../src/fewbits/report/page/rational.js";

const SPECIAL = new Map([
  ["-0", -0],
  ["inf", Infinity],
  ["-inf", -Infinity],
  ["nan", Number.NaN],
]);

const read = (text) => SPECIAL.get(text) ?? rational(...text.split("/").map(BigInt));
const write = (value) => {
  if (value === null) return null;
  if (typeof value === "number")
    return Object.is(value, -0) ? "-0" : String(value).toLowerCase().replace("infinity", "inf");
  const { n, d } = reduced(value);
  return `${n}/${d}`;
};
const attempt = (work) => {
  try {
    return work();
  } catch (error) {
    return `error: ${error.message}`;
  }
};

const OPS = {
  decode: ({ row, codes }) => {
    const fmt = new Format(row);
    const count = codes ?? 2 ** fmt.bits;
    return Array.from({ length: count }, (_, code) => write(decode(BigInt(code), fmt)));
  },
  encode: ({ row, cases }) => {
    const fmt = new Format(row);
    return cases.map(([value, rounding, overflow, random]) =>
      String(encode(read(value), fmt, rounding, overflow ?? undefined, BigInt(random ?? 0))),
    );
  },
  around: ({ row, values }) => {
    const fmt = new Format(row);
    return values.map((value) => [write(ulp(read(value), fmt)), ...neighbours(read(value), fmt).map(write)]);
  },
  derived: ({ row }) => {
    const fmt = new Format(row);
    const { bits, emin, hasInf, hasNan, hasNegativeZero } = fmt;
    const [infCode, nanCode, maxCode] = [fmt.infCode, fmt.nanCode, fmt.maxCode].map((code) =>
      code === null ? null : Number(code),
    );
    return {
      bits,
      emin,
      hasInf,
      hasNan,
      hasNegativeZero,
      infCode,
      nanCode,
      maxCode,
      max: write(fmt.max),
      eps: write(fmt.eps),
    };
  },
  by_name: ({ names }) => names.map((name) => attempt(() => formatNamed(name)?.row ?? null)),
  literal: ({ rows, texts }) => {
    const formats = rows.map((row) => new Format(row));
    const named = (name) => formats.find((fmt) => fmt.name === name);
    return texts.map((text) => attempt(() => write(parse(text, formats, named).value)));
  },
  doubles: ({ values }) =>
    values.map((value) => [write(fromNumber(Number(value))), toNumber(fromNumber(Number(value)))]),
  exactly: ({ values }) => values.map((value) => exactly(read(value))),
  store: ({ element, scale, tensor, size, divisor, lowest, rule, values }) => {
    const scheme = {
      name: "",
      element: new Format(element),
      scale: new Format(scale),
      tensorScale: tensor ? new Format(tensor) : null,
      size,
      divisor: divisor ? fromNumber(divisor) : null,
      lowest: lowest ? BigInt(lowest) : null,
    };
    const stored = store(values.map(read), scheme, rule ?? undefined);
    return stored.blocks.map((block) => [Number(block.scaleCode), block.codes.map(Number), block.values.map(write)]);
  },
};

const jobs = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(jobs.map((job) => OPS[job.op](job))));
